"""Results and arrays of analyses -> figures and one page to share. Nothing here trains, evaluates or loads a model.

All claims are those of `maskft_lab.results.compare`; figures are from the arrays of `maskft_lab.analysis`.
"""
