"""``maskft masks``: several saved masks as one adapter."""

from __future__ import annotations

import argparse
import sys

# As in maskft.masks.combine, which would import torch for --help.
COMBINATIONS = ("union", "intersection", "vote")

HINTS = {"--output_dir": "the new folder is --output"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft masks``."""
    parser.add_argument(
        "combination",
        choices=COMBINATIONS,
        help="union: remove a weight that any mask removes; intersection: that all remove; vote: that more than half "
        "remove",
    )
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="adapter folders over one base, two or more")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the combined adapter")


def run(args: argparse.Namespace) -> None:
    """Combine and write."""
    from .early import check_mask

    for adapter in args.adapters:
        check_mask(adapter)

    from maskft.masks.combine import combine_adapters

    print(combine_adapters(args.adapters, args.combination, args.output), file=sys.stderr)
