"""Studies, evaluation, verdicts and reports about masks: whether they help. The method itself is :mod:`maskft`."""
