"""Results as files, and what may be claimed from them: schema, statistics, verdicts, the paper's tables."""

# Of the text that comparisons and tables are rendered to.
FORMATS = ("terminal", "markdown", "latex", "json")
TABLE_FORMATS = ("terminal", "markdown", "latex")
