"""Results and arrays of analyses -> figures and one page to share. Nothing here trains, evaluates or loads a model.

What is claimed is what `maskft_lab.results.compare` claims; figures are from the arrays of `maskft_lab.analysis`.
"""
