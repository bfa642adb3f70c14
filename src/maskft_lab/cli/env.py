"""``maskft env``: facts for a bug report."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``maskft env`` has no options."""


def run(args: argparse.Namespace) -> None:
    """Print versions and machine facts as JSON."""
    from maskft_common.environment import bfloat16_instructions, environment

    facts = environment()
    # environment() goes into result files too; this is only for bug reports.
    facts["bfloat16_instructions"] = bfloat16_instructions()
    print(json.dumps(facts, indent=2))
