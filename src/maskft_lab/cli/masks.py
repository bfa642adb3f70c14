"""``maskft masks``: combine, compare and export adapter folders; no model is loaded."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands of ``maskft masks``."""
    operations = {
        "union": "write an adapter that removes what any of the masks removes",
        "intersect": "write an adapter that removes what all of the masks remove",
        "vote": "write an adapter that removes what most of the masks remove",
        "minus": "write an adapter that removes what the first mask removes and no other does",
    }
    commands = parser.add_subparsers(dest="operation", metavar="OPERATION", required=True)
    for name, text in operations.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        command.add_argument("adapters", nargs="+", metavar="DIR", help="adapter folders over one base, two or more")
        command.add_argument("--output_dir", required=True, metavar="DIR", help="where the new adapter goes")
        if name == "vote":
            command.add_argument("--at_least", type=int, metavar="N", help="votes needed (default: more than half)")
    text = "show how much each two masks remove in common, and how much chance gives"
    compare = commands.add_parser("compare", help=text, description=f"{text}.", allow_abbrev=False)
    compare.add_argument("adapters", nargs="+", metavar="DIR", help="adapter folders over one base, two or more")
    compare.add_argument("--format", choices=("terminal", "markdown", "latex", "json"), default="terminal")
    compare.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of chance's interval, in (0, 1)")
    text = "write the places that a mask sets to zero, by the names of the weights"
    export = commands.add_parser("export", help=text, description=f"{text}.", allow_abbrev=False)
    export.add_argument("adapters", nargs=1, metavar="DIR", help="adapter folder")
    export.add_argument("--output", required=True, metavar="FILE", help="a new .safetensors file")


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    if args.operation == "compare":
        _compare(args)
    elif args.operation == "export":
        _export(args)
    else:
        from maskft.adapter.combine import combine_adapters

        at_least = getattr(args, "at_least", None)
        removed, numel = combine_adapters(args.operation, args.adapters, args.output_dir, at_least)
        print(f"{args.output_dir}: removes {removed:,} of {numel:,} weights ({removed / numel:.2%})")


def _export(args: argparse.Namespace) -> None:
    from maskft.adapter.export import export

    num_removed, num_weights = export(args.adapters[0], args.output)
    print(f"{args.output}: {num_removed:,} places in {num_weights} weights")


def _compare(args: argparse.Namespace) -> None:
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
