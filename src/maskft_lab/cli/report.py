"""``maskft report``: one page about a study, figures for a paper, and the paper's tables. Trains nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskft_common.command_line import OneLineParser
from maskft_common.errors import UserError

from ..results import TABLE_FORMATS

TABLES = "tables"


def main(argv: list[str]) -> None:
    """Run ``maskft report STUDY`` or ``maskft report tables``."""
    # Subcommands of argparse would need a word for the page as well, maskft report page STUDY.
    # A folder named tables is given as ./tables.
    if argv[:1] == [TABLES]:
        args = make_tables_parser().parse_args(argv[1:])
        _tables(args)
    else:
        args = make_parser().parse_args(argv)
        _report(args)


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``maskft report STUDY``."""
    # A description of its own: the command's line in `maskft --help` is about both parsers.
    parser = OneLineParser("maskft report")
    parser.description = (
        "One HTML file about a study, to be opened from disk: verdict, gain against forgetting, table, curves, "
        "ablations, masks, landscape, curvature, bound, cost, recipe. It makes no network requests. maskft "
        "report tables --help: the paper's tables with your figures."
    )
    parser.add_argument(
        "study",
        metavar="STUDY",
        help="folder of a study, or of published results such as results/small-products",
    )

    # Outputs, at least one
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page to write, such as report.html",
    )
    parser.add_argument(
        "--figures",
        metavar="DIR",
        help="write every figure as SVG (light and dark), PDF and PNG, at a paper's size",
    )
    parser.add_argument(
        "--only",
        metavar="A,B",
        help="of --figures those with these numbers in the paper, or names of files: 1,5,14 (default: all)",
    )

    # Where a folder holds several
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="base model whose runs are meant (default: the only one)",
    )
    parser.add_argument(
        "--study_name",
        metavar="NAME",
        help="study that is meant; needed where several share the folder",
    )
    return parser


def make_tables_parser() -> argparse.ArgumentParser:
    """The parser of ``maskft report tables``."""
    parser = OneLineParser(f"maskft report {TABLES}")
    parser.description = (
        "The paper's Tables 1, 2, 4, 5 and 6 with your figures beside the paper's. A result is in the row and column "
        "of its method, checkpoint, domain and base model; see docs/results.md. Scores are in percent."
    )
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULT",
        help="result files, or folders, with all below them",
    )
    parser.add_argument(
        "--format",
        choices=TABLE_FORMATS,
        default="terminal",
        help="form of the output (default: terminal)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file to write to (default: the terminal)",
    )
    return parser


def _report(args: argparse.Namespace) -> None:
    # numpy is imported from here on, not for --help.
    from maskft_common.files import expand_user, write_bytes

    from ..report.catalogue import select_figures
    from ..report.evidence import gather

    _check(args)
    names = (args.only or "").split(",")
    names = [name.strip() for name in names]
    # Without any name all figures.
    figures = select_figures([name for name in names if name])
    evidence = gather(expand_user(args.study), base=args.base, study_name=args.study_name)

    # Everything is drawn before anything is written: a figure that fails leaves no half of a report.
    contents: dict[Path, bytes] = {}
    if args.figures:
        contents |= _figures(evidence, figures, Path(args.figures), is_chosen=bool(args.only))
    if args.output:
        from ..report.page import render_report

        page = render_report(evidence)
        contents[Path(args.output)] = page.encode()

    for file, content in contents.items():
        write_bytes(file, content)
        print(f"wrote {file}")


def _check(args: argparse.Namespace) -> None:
    """Check that the options name an output that can be written."""
    from maskft_common.files import check_place, expand_user

    if not (args.output or args.figures):
        raise UserError("no output: give -o report.html for the page, --figures DIR for the figures")
    if args.only and not args.figures:
        raise UserError("--only chooses figures: give --figures DIR too")
    if args.output:
        file = expand_user(args.output)
        check_place(file, "--output")
        # A study's own files are JSON and YAML.
        if file.exists() and file.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {args.output} exists and is no HTML page: name another file")
    if args.figures:
        folder = expand_user(args.figures)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--figures {args.figures!r} is a file; name a folder")
        check_place(folder / "figure.svg", "--figures")


def _figures(evidence, figures, folder: Path, is_chosen: bool) -> dict[Path, bytes]:
    """File -> content of every figure that can be drawn."""
    from ..report.catalogue import draw_figures
    from ..report.charts import files_of

    # A figure may lack data. That is an error only if figures were chosen and none of them can be drawn.
    drawn, missing = draw_figures(evidence, figures)
    if is_chosen and not drawn:
        # One line: the first reason stands for all.
        first = missing[0]
        raise UserError(f"{first.figure.title} cannot be drawn: {first.reason}; {first.command}")
    for each in missing:
        print(f"left out {each.figure.key}: {each.reason}; {each.command}", file=sys.stderr)

    contents: dict[Path, bytes] = {}
    for figure, chart in drawn:
        for name, content in files_of(chart, figure.key).items():
            contents[folder / name] = content
    return contents


def _tables(args: argparse.Namespace) -> None:
    from maskft_common.files import write_text

    from ..results.paper_tables import paper_tables, render_tables
    from ..results.reading import check_output, read_all

    # Before the results are read, which may take a while.
    check_output(args.output, args.results)
    results = read_all(args.results)
    tables, left_over = paper_tables(results)
    text = render_tables(tables, left_over, args.format)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}")
    else:
        print(text, end="")
