"""``maskft report``: tables from result files. Nothing here trains or evaluates."""

from __future__ import annotations

import argparse

from ..errors import UserError
from ..results import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be reported, each with its options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    tables = kinds.add_parser(
        "tables",
        help="the paper's Tables 1, 2, 4, 5, 6, 8 and 9 with your figures beside the paper's",
        description="The paper's Tables 1, 2, 4, 5, 6, 8 and 9 with your figures beside the paper's. A result stands "
        "where its method, checkpoint, domain and base model belong; see docs/results.md. Scores are in percent.",
        allow_abbrev=False,
    )
    tables.add_argument("results", nargs="*", metavar="RESULT", help="result files, or folders, with all below them")
    tables.add_argument("--tables", metavar="N,N", help="numbers of the tables, separated by commas (default: all)")
    tables.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="BENCHMARK=TASK[/METRIC]",
        help="the task that measures a benchmark in these results, e.g. gsm8k=heldout/accuracy; its metric must be a "
        "fraction; may be repeated",
    )
    tables.add_argument("--format", choices=FORMATS, default="terminal", help="form of the output (default: terminal)")
    tables.add_argument("--output", metavar="FILE", help="write to FILE instead of printing")


def run(args: argparse.Namespace) -> None:
    """Read the results, fill the tables, print or write them."""
    from ..files import write_text
    from ..results.paper_tables import paper_tables, read_results, render_tables

    measures = {}
    for measure in args.measure:
        benchmark, equals, task = measure.partition("=")
        if not (benchmark and equals and task):
            raise UserError(f"--measure {measure} is not BENCHMARK=TASK, such as gsm8k=heldout/accuracy")
        measures[benchmark] = task
    ids = [number.strip() for number in args.tables.split(",")] if args.tables else None
    tables, left_over = paper_tables(read_results(args.results), ids, measures)
    text = render_tables(tables, left_over, args.format)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}")
    else:
        print(text, end="")
