"""``maskft analyze``: arrays about finished runs, for figures. Draws nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskft_common.errors import UserError, did_you_mean
from maskft_common.layout import ANALYSIS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft analyze``."""
    parser.description = (
        "Compute what the figures of the paper show from the finished runs of a study: one JSON file per analysis, "
        "with its settings; what is there already is not computed again, and what cannot be computed is left out with "
        "the reason. bound: Eqs 6-15. masks: Figs 13, 14. landscape: Figs 5, 12. curvature: Eqs 16-18. Figures of "
        "results and training histories are drawn by maskft report, from these."
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument("study", metavar="STUDY", help="folder of a study, with its models")
    runs.add_argument("--what", metavar="A,B", help=f"of {', '.join(_ANALYSES)} (default: all)")
    runs.add_argument("--base", metavar="NAME", help="which base model's runs, if the study has several")
    runs.add_argument("--mask", metavar="NAME", help="id or name of the mask for bound, landscape and curvature")
    rows = parser.add_argument_group("rows on which losses are taken (landscape, curvature)")
    rows.add_argument("--rows", metavar="DIR", help="folder of tokenised rows (default: the study's)")
    rows.add_argument("--num_rows", type=int, default=64, help="rows of each split (default: 64)")
    rows.add_argument("--batch_size", type=int, default=8, help="rows of one forward pass (default: 8)")
    rows.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    rows.add_argument("--seed", type=int, default=0, help="of rows and probes (default: 0)")
    more = parser.add_argument_group("one analysis each")
    more.add_argument("--grid", type=int, default=21, help="landscape: points of an axis (default: 21)")
    more.add_argument("--num_probes", type=int, default=16, help="curvature: random vectors per trace (default: 16)")


def run(args: argparse.Namespace) -> None:
    """Make each analysis that was asked for, and say which were left out and why."""
    from maskft_common.quiet import silence

    from ..analysis.runs import read_study
    from ..estimate.out_of_memory import explained

    for name, least in {"num_rows": 1, "batch_size": 1, "num_probes": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; give {least} or more")
    wanted = [name.strip() for name in (args.what or ",".join(_ANALYSES)).split(",") if name.strip()]
    for name in wanted or [""]:
        if name not in _ANALYSES:
            known = f"{did_you_mean(name, _ANALYSES)}; there are {', '.join(_ANALYSES)}"
            raise UserError(f"--what: no analysis {name!r}{known}")
    runs = read_study(args.study, args.base)
    folder = Path(args.study) / ANALYSIS
    silence()
    problems = []
    for what in wanted:
        file = folder / f"{what}.json"
        try:
            with explained("take a smaller --batch_size, or another --device"):
                _ANALYSES[what](args, runs, file)
        except UserError as error:
            problems.append(f"{what}: {error}")
        else:
            print(f"{what}: {file}")
    if len(problems) == len(wanted):
        more = f" (and {len(problems) - 1} more analyses that were left out)" if len(problems) > 1 else ""
        raise UserError(f"nothing was computed; {problems[0]}{more}")
    for problem in problems:
        print(f"left out {problem}")


def _bound(args, runs, file: Path) -> None:
    import torch

    from maskft.models import load_config

    from ..analysis.bound import analyse_bound, stable_training_loss
    from ..analysis.runs import BEST, find_mask, full_run
    from ..estimate.estimate import model_without_data

    mask = find_mask(runs, args.mask)
    full = full_run(mask, runs)
    if full.data.get("train") != mask.data.get("train"):
        raise UserError(f"{mask.name} and {full.name} were trained on different numbers of rows; name another --mask")
    losses = tuple(stable_training_loss(run.history, run.summary["best_step"]) for run in (full, mask))
    config = load_config(full.models[BEST])
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in model_without_data(config).parameters())
    size = num_weights, config.get_text_config().vocab_size
    analyse_bound(file, mask.models[BEST], losses, size, mask.data.get("train"))


def _masks(args, runs, file: Path) -> None:
    from ..analysis.masks import analyse_masks
    from ..analysis.runs import BEST, MASK, find_mask, start_model

    find_mask(runs)  # raises where there is none
    masks = [run for run in runs if run.method.endswith(MASK) and BEST in run.models]
    adapters = {run.id: (run.models[BEST], start_model(run, runs)) for run in masks}
    analyse_masks(file, adapters)


def _landscape(args, runs, file: Path) -> None:
    from ..analysis.landscape import analyse_landscape
    from ..analysis.runs import BEST, LAST, find_mask, full_run

    mask = find_mask(runs, args.mask)
    full = full_run(mask, runs)
    best, last = full.models[BEST], full.models.get(LAST)
    if last in (None, best):
        why = "was not kept: train it with keep_last" if last is None else "is its best checkpoint: train it for longer"
        raise UserError(f"a landscape needs a third model, and the end of {full.id} {why}")
    analyse_landscape(file, (best, last, mask.models[BEST]), _rows(args), _sampling(args), args.grid)


def _curvature(args, runs, file: Path) -> None:
    from ..analysis.curvature import analyse_curvature
    from ..analysis.runs import BEST, find_mask, start_model

    mask = find_mask(runs, args.mask)
    start, rows = start_model(mask, runs), _rows(args)["train"]
    analyse_curvature(file, start, mask.models[BEST], rows, args.num_probes, _sampling(args))


def _sampling(args):
    from ..analysis.losses import Sampling
    from ..evaluation.load import check_device

    if args.device.startswith("mps"):
        raise UserError(f"--device is {args.device!r}, which has no float64 to sum losses in; name cpu or cuda")
    check_device(args.device)
    return Sampling(args.batch_size, args.device, args.seed)


def _rows(args) -> dict[str, list[dict]]:
    from ..analysis.losses import load_rows, rows_folder

    return load_rows(rows_folder(Path(args.study), args.rows), args.num_rows, args.seed)


_ANALYSES = {"bound": _bound, "masks": _masks, "landscape": _landscape, "curvature": _curvature}
