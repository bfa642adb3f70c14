"""Tables and figures from result files; nothing here trains or evaluates."""
