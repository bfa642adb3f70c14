"""``maskft env``: facts for a bug report."""

from __future__ import annotations

import json


def add_arguments(parser) -> None:
    """``maskft env`` has no options."""


def run(args) -> None:
    """Print versions and machine facts as JSON."""
    from maskft_common.environment import environment

    print(json.dumps(environment(), indent=2))
