"""Did it help? Studies, evaluation, verdicts and reports about masks; the method itself is :mod:`maskft`."""
