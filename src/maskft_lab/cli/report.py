"""``maskft report``: one page about a study, figures for a paper, and the paper's tables. Trains nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskft_common.errors import UserError

from ..results import TABLE_FORMATS

TABLES = "tables"


def main(argv: list[str]) -> None:
    """Run ``maskft report STUDY`` or ``maskft report tables``."""
    from .main import OneLineParser

    is_tables = argv[:1] == [TABLES]
    parser = OneLineParser(prog="maskft report" + (f" {TABLES}" if is_tables else ""), allow_abbrev=False)
    (_add_tables if is_tables else _add_report)(parser)
    (_tables if is_tables else _report)(parser.parse_args(argv[1:] if is_tables else argv))


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "One HTML file about a study, to be opened from disk: verdict, gain against forgetting, table, curves, "
        "ablations, masks, landscape, curvature, bound, cost, recipe. It makes no network requests. maskft "
        "report tables --help: the paper's tables with your figures."
    )
    parser.add_argument(
        "study", metavar="STUDY", help="folder of a study, or of published results such as results/small-products"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the page to write, such as report.html")
    parser.add_argument(
        "--figures", metavar="DIR", help="write every figure as SVG (light and dark), PDF and PNG, at a paper's size"
    )
    parser.add_argument(
        "--only", metavar="A,B", help="of --figures those with these numbers in the paper, or names of files: 1,5,14"
    )
    parser.add_argument("--base", metavar="NAME", help="which base model's runs, if the study has several")
    parser.add_argument("--study_name", metavar="NAME", help="the study that is meant, where several share the folder")


def _report(args: argparse.Namespace) -> None:
    from maskft_common.files import write_bytes

    from ..report.catalogue import select_figures
    from ..report.evidence import gather

    if not (args.output or args.figures):
        raise UserError("say what to write: -o report.html for the page, --figures DIR for the figures")
    if args.only and not args.figures:
        raise UserError("--only chooses figures: give --figures DIR too")
    if args.output and Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a folder: name a file in it, such as report.html")
    if args.figures and Path(args.figures).exists() and not Path(args.figures).is_dir():
        raise UserError(f"--figures {args.figures!r} is a file; name a folder")
    figures = select_figures([word.strip() for word in (args.only or "").split(",") if word.strip()])
    evidence = gather(args.study, base=args.base, study_name=args.study_name)
    contents = _figures(evidence, figures, Path(args.figures), bool(args.only)) if args.figures else {}
    if args.output:
        from ..report.page import render_report

        contents[Path(args.output)] = render_report(evidence).encode()
    for file, content in contents.items():  # all was drawn before anything is written
        write_bytes(file, content)
        print(f"wrote {file}")


def _figures(evidence, figures, folder: Path, is_chosen: bool) -> dict[Path, bytes]:
    from ..report.catalogue import draw_figures
    from ..report.charts import files_of

    drawn, missing = draw_figures(evidence, figures)
    if is_chosen and not drawn:
        raise UserError(f"{missing[0].figure.title} cannot be drawn: {missing[0].reason}; {missing[0].command}")
    for each in missing:
        print(f"left out {each.figure.key}: {each.reason}; {each.command}", file=sys.stderr)
    files = [files_of(chart, figure.key) for figure, chart in drawn]
    return {folder / name: content for each in files for name, content in each.items()}


def _add_tables(tables: argparse.ArgumentParser) -> None:
    tables.description = (
        "The paper's Tables 1, 2, 4, 5 and 6 with your figures beside the paper's. A result stands where its "
        "method, checkpoint, domain and base model belong; see docs/results.md. Scores are in percent."
    )
    tables.add_argument("results", nargs="*", metavar="RESULT", help="result files, or folders, with all below them")
    tables.add_argument(
        "--format", choices=TABLE_FORMATS, default="terminal", help="form of the output (default: terminal)"
    )
    tables.add_argument("--output", metavar="FILE", help="write to FILE instead of printing")


def _tables(args: argparse.Namespace) -> None:
    from maskft_common.files import write_text

    from ..results.paper_tables import paper_tables, render_tables
    from ..results.reading import check_output, read_all

    check_output(args.output, args.results)
    tables, left_over = paper_tables(read_all(args.results))
    text = render_tables(tables, left_over, args.format)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}")
    else:
        print(text, end="")
