"""``maskft masks``: several saved masks as one adapter."""

from __future__ import annotations

import argparse
import sys

# A copy of the names in maskft.masks.combine, which imports torch: --help comes without.
COMBINATIONS = ("union", "intersection", "vote")

# Options that people take from other commands -> the remedy.
HINTS = {"--output_dir": "the new folder is --output"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft masks``."""
    parser.add_argument(
        "combination",
        choices=COMBINATIONS,
        help="union: remove a weight that any mask removes; intersection: that all remove; vote: that more than half "
        "remove",
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="DIR",
        help="adapter folders over one base, two or more",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new folder for the combined adapter",
    )


def run(args: argparse.Namespace) -> None:
    """Combine and write."""
    from .early import check_mask

    # All of them before torch is imported.
    adapters = [check_mask(adapter) for adapter in args.adapters]

    # From here on torch is imported.
    from maskft.masks.combine import combine_adapters

    message = combine_adapters(adapters, args.combination, args.output)
    print(message, file=sys.stderr)
