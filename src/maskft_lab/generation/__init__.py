"""Fast greedy answers: batched generation with a shared prefix, and the model that lm-eval sees."""
