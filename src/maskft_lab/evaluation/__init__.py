"""A model in, a result file out: held-out loss, benchmarks, judged answers."""
