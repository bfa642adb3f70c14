"""``maskft compare``: did it help? Differences with intervals, and in words what may be claimed."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskft_base.errors import UserError

from ..results import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft compare``."""
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULT",
        help="result files of maskft evaluate, lm-eval's samples_*.jsonl or inspect-ai's logs (.eval, .json), or "
        "folders of them; NAME=PATH names a model; results of one name with different seeds count as training seeds of "
        "one method; one method alone is shown without a comparison",
    )
    parser.add_argument("--baseline", metavar="NAME", help="name of the result to compare with (default: the first's)")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to compare, separated by commas (default: all)")
    parser.add_argument("--metrics", metavar="A,B", help="metrics to compare, separated by commas (default: all)")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="form of the output (default: terminal)")
    parser.add_argument("--output", metavar="FILE", help="write to FILE instead of printing")
    parser.add_argument(
        "--num_resamples",
        type=int,
        default=10_000,
        metavar="N",
        help="bootstrap samples per difference, at least 100 (default: 10000)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap, >= 0 (default: 0)")
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="coverage of the intervals, a fraction in (0, 1) (default: 0.95)",
    )
    parser.add_argument(
        "--cluster_by",
        metavar="FIELD",
        help="field of the items (lm-eval: of the documents; inspect-ai: of the metadata) whose values are clusters of "
        "dependent items, such as a passage (default: cluster_id where items have it)",
    )
    parser.add_argument(
        "--fixed_seeds",
        action="store_true",
        help="claim something about these trained models alone: intervals are over items, training seeds are not a "
        "sample (default: seeds are drawn as items are, so that claims hold for other seeds too)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="M",
        help="also test whether a method is no worse than M, or equivalent within M (two one-sided tests): "
        "of accuracies where there are some, 0.01 is one point; else in the unit of the one metric, such as nats per "
        "token (default: not tested)",
    )
    _add_plan_arguments(parser)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument_group(
        "planning", "what a comparison could see, before it is run; with results, from the variances of this pilot"
    )
    plan.add_argument("--plan", action="store_true", help="print the smallest difference that would be seen")
    plan.add_argument(
        "--num_items", metavar="N,M", help="numbers of items (default: the pilot's, and 2 and 4 times it)"
    )
    plan.add_argument("--num_seeds", default="1", metavar="N,M", help="numbers of training seeds (default: 1)")
    plan.add_argument("--num_comparisons", type=int, default=1, metavar="N", help="comparisons planned (default: 1)")
    plan.add_argument("--base_rate", type=float, metavar="P", help="accuracy of the baseline, a fraction in (0, 1)")
    plan.add_argument(
        "--discordance",
        type=float,
        metavar="P",
        help="share of the items that exactly one model has right (default: 2 p (1 - p), of independent models)",
    )
    plan.add_argument(
        "--seed_sd",
        type=float,
        default=0.0,
        metavar="SD",
        help="standard deviation of the difference between seeds, a fraction (default: 0)",
    )
    plan.add_argument("--power", type=float, default=0.8, metavar="P", help="in [0.5, 1) (default: 0.8)")


def run(args: argparse.Namespace) -> None:
    """Read the results, compare them, print or write the comparison; or plan one."""
    from maskft_base.files import write_text

    from ..results.compare import compare
    from ..results.reading import input_files, read_all
    from ..results.scores import scores
    from ..results.text import render, render_scores

    if not args.results and not args.plan:
        raise UserError("no results to compare: give files of maskft evaluate, lm-eval or inspect-ai, or --plan")
    if args.output and Path(args.output).resolve() in input_files(args.results):
        raise UserError(f"--output {args.output} is one of the results and would replace it: name another file")
    results = read_all(args.results, args.cluster_by)
    tasks, metrics = _names(args.tasks), _names(args.metrics)
    if args.plan:
        text = _plan(args, results, tasks, metrics)
    elif len({result["name"] for result in results}) == 1 and args.baseline is None:
        text = render_scores(scores(results, tasks, metrics, args.fixed_seeds), args.format)
    else:
        comparison = compare(
            results,
            args.baseline,
            tasks=tasks,
            metrics=metrics,
            num_resamples=args.num_resamples,
            seed=args.seed,
            confidence=args.confidence,
            margin=args.margin,
            fixed_seeds=args.fixed_seeds,
        )
        text = render(comparison, args.format)
    if args.output:
        write_text(args.output, text)
        print(f"wrote {args.output}")
    else:
        print(text, end="")


def _plan(args: argparse.Namespace, results: list, tasks: list[str] | None, metrics: list[str] | None) -> str:
    from ..results.compare import main_samples
    from ..results.planning import plan_from_pilot, plan_from_rates
    from ..results.text import render_plan

    num_items = _numbers("num_items", args.num_items) if args.num_items else None
    common = (_numbers("num_seeds", args.num_seeds), args.num_comparisons)
    if results:
        samples = main_samples(results, args.baseline, tasks, metrics)
        plan = plan_from_pilot(samples, num_items, *common, args.power, args.confidence)
    else:
        if num_items is None:
            raise UserError("a plan without a pilot needs --num_items: give the numbers of items, 300,1000")
        rates = (args.base_rate, args.discordance, args.seed_sd)
        plan = plan_from_rates(num_items, *common, *rates, args.power, args.confidence)
    return render_plan(plan, args.format)


def _numbers(option: str, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise UserError(f"--{option} {value}: give whole numbers separated by commas, such as 300,1000") from None


def _names(value: str | None) -> list[str] | None:
    return [name.strip() for name in value.split(",")] if value is not None else None
