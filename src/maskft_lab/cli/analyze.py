"""``maskft analyze``: arrays about finished runs, for figures. Draws nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import expand_user
from maskft_common.layout import ANALYSIS

# For annotations only: `losses` imports torch.
if TYPE_CHECKING:
    from ..analysis.losses import Sampling
    from ..analysis.records import Report
    from ..analysis.runs import TrainedRun

# Writes the file of an analysis and reports the pieces done and their total; its inputs are checked already.
Analysis = Callable[[Path, "Report"], Any]

# Of one analysis, which do not stop the others. OSError: a file that cannot be read; its message is clear.
_MISTAKES = (UserError, OSError)

# Option -> its smallest value.
_LEAST = {
    "num_rows": 1,
    "batch_size": 1,
    "num_probes": 1,
    "grid": 3,
    "seed": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft analyze``."""
    parser.description = (
        "Compute the arrays behind the paper's figures from the finished runs of a study: one JSON file per analysis, "
        "with its settings. Finished analyses are not computed again. An analysis that this study cannot have is "
        "left out with the reason, before anything is computed. bound: Eqs 6-15. masks: Figs 13, 14. landscape: "
        "Figs 5, 12. curvature: Eqs 16-18. maskft report draws figures from these files."
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument(
        "study",
        metavar="STUDY",
        help="folder of a study, with its models",
    )
    runs.add_argument(
        "--what",
        metavar="A,B",
        help=f"analyses, of {', '.join(_ANALYSES)} (default: all)",
    )
    runs.add_argument(
        "--base",
        metavar="NAME",
        help="base model whose runs are meant (default: the only one)",
    )
    runs.add_argument(
        "--mask",
        metavar="NAME",
        help="id or name of the mask for bound, landscape and curvature (default: the first)",
    )

    rows = parser.add_argument_group("rows on which losses are computed (landscape, curvature)")
    rows.add_argument(
        "--rows",
        metavar="DIR",
        help="folder of tokenised rows (default: the study's)",
    )
    rows.add_argument(
        "--num_rows",
        type=int,
        default=64,
        help="rows of each split, >= 1 (default: 64)",
    )
    rows.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="rows of one forward pass, >= 1 (default: 8)",
    )
    rows.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda (default: cpu)",
    )
    rows.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of rows and probes, >= 0 (default: 0)",
    )

    more = parser.add_argument_group("one analysis each")
    more.add_argument(
        "--grid",
        type=int,
        default=21,
        help="landscape: points of an axis, >= 3 (default: 21)",
    )
    more.add_argument(
        "--num_probes",
        type=int,
        default=16,
        help="curvature: random vectors per trace, >= 1 (default: 16)",
    )


def run(args: argparse.Namespace) -> None:
    """Check each analysis that was asked for, say which are left out and why, then compute the others."""
    # argparse checks types, not ranges.
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value < least:
            raise UserError(f"--{name} is {value}; give {least} or more")
    wanted = _wanted(args.what)

    from ..analysis.runs import read_study

    # Reads JSON only: a folder that is not a study is reported without the seconds that torch's import takes.
    # A shell leaves the ~ of --rows=~/rows as it is, and so do programs that start this one without a shell.
    study = expand_user(args.study)
    runs = read_study(study, args.base)

    # From here on torch is imported.
    from maskft_common.quiet import silence

    silence()
    # All are checked before the first is computed, which may take an hour.
    analyses: dict[str, Analysis] = {}
    problems: list[str] = []
    for name in wanted:
        try:
            analyses[name] = _ANALYSES[name](args, runs)
        except _MISTAKES as error:
            problems.append(f"{name}: {error}")

    # If nothing is left, the reason is the error that ends the command, and is not printed twice.
    if analyses:
        for problem in problems:
            print(f"left out {problem}", flush=True)

    failures = _compute(analyses, study / ANALYSIS)
    # Also if none was left to compute. One analysis that was computed is a success, and the reasons of the others are
    # printed.
    if len(failures) == len(analyses):
        first, *others = [*problems, *failures]
        and_others = ""
        if others:
            and_others = f" (and {len(others)} more analyses that were left out)"
        raise UserError(f"nothing was computed; {first}{and_others}")


def _wanted(what: str | None) -> list[str]:
    """The names in ``--what``; all without it."""
    if what is None:
        return list(_ANALYSES)
    names = [name.strip() for name in what.split(",")]
    names = [name for name in names if name]
    # A value that is empty, or of commas alone, is reported as an analysis without name.
    for name in names or [""]:
        if name not in _ANALYSES:
            hint = did_you_mean(name, _ANALYSES)
            raise UserError(f"--what: no analysis {name!r}{hint}; there are {', '.join(_ANALYSES)}")
    return names


def _compute(analyses: dict[str, Analysis], folder: Path) -> list[str]:
    """Compute one analysis after another; returns the failures, which do not stop the others."""
    from maskft_common.progress_bar import Progress, time_text

    from ..estimate.out_of_memory import explained

    failures: list[str] = []
    for number, (name, analyse) in enumerate(analyses.items(), 1):
        print(f"{name}: computing ({number} of {len(analyses)})", file=sys.stderr, flush=True)
        started_at = time.monotonic()
        file = folder / f"{name}.json"
        try:
            with explained("use a smaller --batch_size, or another --device"), Progress() as progress:
                # An analysis knows its number of pieces only once it has begun: `report` replaces the total.
                bar = progress.add_task(name, total=1)

                # The defaults bind this analysis' bar; a closure would look the names up when it is called.
                def report(num_done: int, total: int, progress=progress, bar=bar) -> None:
                    progress.update(bar, total=total)
                    progress.move(bar, num_done)

                analyse(file, report)
        except BrokenPipeError:
            # The reader of stderr has closed: `main` ends the command.
            raise
        except _MISTAKES as error:
            failures.append(f"{name}: {error}")
            print(f"left out {name}: {error}", flush=True)
            continue
        time_s = time.monotonic() - started_at
        print(f"{name}: {file} ({time_text(time_s)})", flush=True)
    return failures


# Analyses: each checks its inputs, and returns the function that computes. They import their modules themselves, which
# need torch and more: --help and mistakes in the options come without.


def _bound(args: argparse.Namespace, runs: Sequence[TrainedRun]) -> Analysis:
    import torch

    from maskft.models import load_config

    from ..analysis.bound import analyse_bound, check_num_rows, stable_training_loss
    from ..analysis.masks import masks_of
    from ..analysis.runs import BEST, find_mask, full_run
    from ..estimate.empty_model import model_without_data

    mask = find_mask(runs, args.mask)
    full = full_run(mask, runs)
    for run in (full, mask):
        if not run.history:
            raise UserError(f"{run.id} has no training history, and a bound needs its losses; name another --mask")
        # The trainer logs the loss that it minimises.
        if run.summary.get("kl") is not None:
            raise UserError(
                f"the training losses of {run.id} contain its KL term, and a bound is of the loss alone; name another "
                "--mask"
            )
    num_rows = mask.data.get("train")
    if full.data.get("train") != num_rows:
        raise UserError(f"{mask.name} and {full.name} were trained on different numbers of rows; name another --mask")
    check_num_rows(num_rows)
    # An empty mask takes the place of one that is not better than none, whose losses these are.
    if masks_of(mask.models[BEST]).num_removed == 0:
        raise UserError(f"{mask.id} removes nothing, so that it is not the mask of its training; name another --mask")
    # Of the model before masking and of the masked one.
    losses = (
        stable_training_loss(full.history, full.best_step),
        stable_training_loss(mask.history, mask.best_step),
    )

    # The bound needs the model's size only: on the meta device no weights are allocated or read.
    config = load_config(full.models[BEST])
    with torch.device("meta"):
        model = model_without_data(config)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    vocab_size = config.get_text_config().vocab_size
    size = (num_weights, vocab_size)
    return lambda file, report: analyse_bound(file, mask.models[BEST], losses, size, num_rows)


def _masks(args: argparse.Namespace, runs: Sequence[TrainedRun]) -> Analysis:
    from ..analysis.masks import analyse_masks
    from ..analysis.runs import BEST, MASK, find_mask, start_model

    find_mask(runs)  # raises if there is none
    adapters: dict[str, tuple[str, str]] = {}
    for run in runs:
        # Learned and fixed masks: mask, random_mask, l1_mask, ...
        is_mask = run.method.endswith(MASK)
        if is_mask and BEST in run.models:
            adapters[run.id] = (run.models[BEST], start_model(run, runs))
    return lambda file, report: analyse_masks(file, adapters, report)


def _landscape(args: argparse.Namespace, runs: Sequence[TrainedRun]) -> Analysis:
    from ..analysis.landscape import analyse_landscape
    from ..analysis.masks import masks_of
    from ..analysis.runs import BEST, LAST, find_mask, full_run

    # Two models give a line, three a plane: the best and the last model of full fine-tuning, and the masked one.
    mask = find_mask(runs, args.mask)
    full = full_run(mask, runs)
    best = full.models[BEST]
    last = full.models.get(LAST)
    if last is None:
        raise UserError(f"a landscape needs a third model, and the end of {full.id} was not kept: use keep_last")
    if last == best:
        raise UserError(
            f"a landscape needs a third model, and the end of {full.id} is its best checkpoint: train longer"
        )

    masks_of(mask.models[BEST])  # raises if the mask does more than set weights to 0
    models = (best, last, mask.models[BEST])
    rows = _rows(args)
    sampling = _sampling(args)
    return lambda file, report: analyse_landscape(file, models, rows, sampling, args.grid, report)


def _curvature(args: argparse.Namespace, runs: Sequence[TrainedRun]) -> Analysis:
    from ..analysis.curvature import analyse_curvature, check_curvlinops
    from ..analysis.masks import masks_of
    from ..analysis.runs import BEST, find_mask, start_model

    check_curvlinops()
    mask = find_mask(runs, args.mask)
    masks_of(mask.models[BEST])  # raises if the mask does more than set weights to 0
    start = start_model(mask, runs)
    rows = _rows(args)["train"]
    sampling = _sampling(args)
    return lambda file, report: analyse_curvature(
        file, start, mask.models[BEST], rows, args.num_probes, sampling, report
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    from ..analysis.losses import Sampling
    from ..evaluation.load_models import check_device

    if args.device.startswith("mps"):
        raise UserError(f"--device is {args.device!r}, which has no float64 to sum losses in; name cpu or cuda")
    check_device(args.device)
    return Sampling(args.batch_size, args.device, args.seed)


def _rows(args: argparse.Namespace) -> dict[str, list[dict]]:
    from ..analysis.losses import load_rows, rows_folder

    given = None if args.rows is None else expand_user(args.rows)
    folder = rows_folder(expand_user(args.study), given)
    return load_rows(folder, args.num_rows, args.seed)


# After the functions, which it names; `run` and `_wanted` look it up when they are called.
_ANALYSES = {
    "bound": _bound,
    "masks": _masks,
    "landscape": _landscape,
    "curvature": _curvature,
}
