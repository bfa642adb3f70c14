"""Result files, their statistics and the verdicts drawn from them; nothing here trains or evaluates."""
