"""The frozen-prefix cache."""


def run(report) -> None:
    """Add the rows."""
