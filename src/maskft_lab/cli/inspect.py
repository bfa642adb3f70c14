"""``maskft inspect``: the weights that an adapter removes."""

from __future__ import annotations

import json


def add_arguments(parser) -> None:
    """Options of ``maskft inspect``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument("--modules", action="store_true", help="a row per module (default: layers share a row)")
    parser.add_argument("--json", action="store_true", help="print JSON: a row per module, and the configuration")


def run(args) -> None:
    """Print size, count and share per kind of module and in total, then base and recipe."""
    from maskft.masks.summary import as_json, summarize, summary_lines

    summary = summarize(args.adapter)
    if args.json:
        print(json.dumps(as_json(summary), indent=2))
        return
    for line in summary_lines(summary, args.modules):
        print(line)
