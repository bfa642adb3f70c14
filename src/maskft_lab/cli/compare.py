"""``maskft compare``: differences between models with intervals, and verdicts in words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..results import FORMATS

if TYPE_CHECKING:
    from ..results.schema import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft compare``."""
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULT",
        help="result files of maskft evaluate, lm-eval's samples_*.jsonl (--log_samples), or folders of either; "
        "NAME=PATH names a model; results of one name with different seeds count as training seeds of one method; one "
        "method alone is shown without a comparison",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="name of the result to compare with (default: the first's)",
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks to compare, separated by commas (default: all)",
    )
    parser.add_argument(
        "--metrics",
        metavar="A,B",
        help="metrics to compare, separated by commas (default: all)",
    )

    # The output
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="terminal",
        help="form of the output: terminal is one page, the others have everything (default: terminal)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file to write to (default: the terminal)",
    )

    # Intervals and verdicts
    parser.add_argument(
        "--num_resamples",
        type=int,
        default=10_000,
        metavar="N",
        help="bootstrap samples per difference, 100 to 2000000 (default: 10000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the bootstrap, >= 0 (default: 0)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="coverage of the intervals of differences, a fraction in (0, 1); scores have 95 %% (default: 0.95)",
    )
    parser.add_argument(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="how often in total you look at this comparison while seeds or items are added; more looks make verdicts "
        "stricter, so that adding seeds until one appears finds no more false ones (default: 1)",
    )
    parser.add_argument(
        "--fixed_seeds",
        action="store_true",
        help="resample items only: claims are about these trained models (default: seeds are resampled too, and claims "
        "are about other seeds as well)",
    )


def run(args: argparse.Namespace) -> None:
    """Read the results, compare them, print or write the comparison."""
    # numpy and scipy are imported from here on, not for --help.
    from maskft_common.files import write_text

    from ..results.reading import check_output

    # Before the seconds of the bootstrap.
    check_output(args.output, args.results)
    text = _compared(args)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}")
    else:
        print(text, end="")


def _compared(args: argparse.Namespace) -> str:
    """The text of the comparison, or of the scores alone if all results are of one method."""
    from maskft_common.errors import UserError

    from ..results.compare import compare
    from ..results.comparison import Settings
    from ..results.reading import read_all
    from ..results.render import render, render_scores
    from ..results.scores import scores

    settings = Settings(
        num_resamples=args.num_resamples,
        seed=args.seed,
        confidence=args.confidence,
        fixed_seeds=args.fixed_seeds,
        looks=args.looks,
    )
    results = read_all(args.results)
    # None: all tasks, and all metrics.
    tasks = _names(args.tasks)
    metrics = _metric_names(args.metrics, results)

    # Results of one name are seeds of one method. With --baseline a comparison is meant: `compare` raises.
    methods = {result["name"] for result in results}
    if len(methods) == 1 and args.baseline is None:
        reached = scores(results, tasks, metrics, args.fixed_seeds)
        if not reached:
            name = results[0]["name"]
            if any(task["metrics"] for result in results for task in result["tasks"].values()):
                raise UserError(
                    f"the {len(results)} results of {name} have no metric in common: give those of one task"
                )
            raise UserError(f"{name} has no metric: evaluate it with a judge, or name other --tasks")
        return render_scores(reached, args.format)

    comparison = compare(results, args.baseline, tasks=tasks, metrics=metrics, settings=settings)
    return render(comparison, args.format)


def _metric_names(value: str | None, results: Sequence[Result]) -> list[str] | None:
    """Names of metrics, of which lm-eval's have a comma before the filter of the answer."""
    names = _names(value)
    if names is None:
        return None
    known: set[str] = set()
    for result in results:
        for record in result["tasks"].values():
            known.update(record["metrics"])

    joined: list[str] = []
    for name in names:
        # exact_match,strict-match has been taken apart.
        with_filter = f"{joined[-1]},{name}" if joined else None
        if with_filter in known and name not in known:
            joined[-1] = with_filter
        else:
            joined.append(name)
    return joined


def _names(value: str | None) -> list[str] | None:
    """Names separated by commas; None if the option is not given, which stands for all."""
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    # A comma at the end is allowed.
    names = [name for name in names if name]
    # A value of commas alone is kept, and reported as an unknown name: an empty list would compare nothing.
    return names or [value]
