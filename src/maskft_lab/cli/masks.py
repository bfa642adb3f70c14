"""``maskft masks compare``: how much masks remove in common; no model is loaded."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``maskft masks compare``."""
    parser.add_argument("operation", choices=("compare",), help="how much each two remove in common, and by chance")
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="adapter folders over one base, two or more")
    parser.add_argument("--format", choices=("terminal", "markdown", "json"), default="terminal")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of chance's interval, in (0, 1)")


def run(args: argparse.Namespace) -> None:
    """Print a row for every two masks."""
    from maskft_base.errors import UserError

    from ..analysis.agreement import compare_adapters
    from ..results.text import Table, draw

    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence is {args.confidence}; it must be between 0 and 1")
    if len(args.adapters) < 2:
        raise UserError("compare needs two adapters or more")
    pairs = compare_adapters(args.adapters, args.confidence)
    if args.format == "json":
        print(json.dumps({"confidence": args.confidence, "pairs": pairs}, indent=1))
        return
    chance = f"by chance [{100 * args.confidence:g} %]"
    columns = ("masks", "removed", "in common", chance, "Jaccard (by chance)", "verdict")
    rows = [
        (
            f"{pair['first']}, {pair['second']}",
            f"{pair['num_removed_first']:,}, {pair['num_removed_second']:,}",
            f"{pair['num_common']:,}",
            f"{pair['expected']:,.1f} [{pair['chance_low']:,}, {pair['chance_high']:,}]",
            f"{pair['jaccard']:.4f} ({pair['jaccard_expected']:.4f})",
            pair["verdict"],
        )
        for pair in pairs
    ]
    print(draw(Table(columns, rows), args.format), end="")
