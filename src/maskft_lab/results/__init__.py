"""Results as files, and what may be claimed from them: schema, statistics, verdicts, the paper's tables."""

FORMATS = ("terminal", "markdown", "json")  # of the text that comparisons and tables are rendered to
