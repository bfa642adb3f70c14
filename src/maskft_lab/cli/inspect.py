"""``maskft inspect``: the weights that an adapter removes."""

from __future__ import annotations

import argparse
import json

from .arguments import adapter_of, add_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft inspect``."""
    add_adapter(parser)
    parser.add_argument(
        "--modules",
        action="store_true",
        help="a row per module (default: layers share a row)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: a row per module, and the configuration",
    )


def run(args: argparse.Namespace) -> None:
    """Print size, count and share per kind of module and in total, then base and recipe."""
    from .early import check_mask

    adapter = check_mask(adapter_of(args))

    # From here on torch is imported.
    from maskft.masks.summary import as_json, summarize, summary_lines

    # From the adapter's files alone: the base model is not loaded.
    summary = summarize(adapter)
    if args.json:
        content = as_json(summary)
        print(json.dumps(content, indent=2))
        return
    for line in summary_lines(summary, args.modules):
        print(line)
