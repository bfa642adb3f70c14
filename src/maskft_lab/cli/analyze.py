"""``maskft analyze``: arrays about finished runs, for figures. Draws nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskft_base.errors import UserError, did_you_mean
from maskft_base.files import ANALYSIS

# What reads files only stands first: it is done before models are loaded.
OF_MODELS = ("bound", "masks", "landscape", "curvature")
WHAT = ("curves", "cost", "ablations", *OF_MODELS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft analyze``."""
    parser.description = (
        "Compute what the figures of the paper show from your own finished runs: one JSON file per analysis, with its "
        "settings; what is there already is not computed again. curves: Fig. 1. cost: Figs 4, 9. ablations: Figs 3, "
        "6-8, 10, 11. bound: Eqs 6-15. masks: Figs 13, 14. landscape: Figs 5, 12. curvature: Eqs 16-18."
    )
    runs = parser.add_argument_group("runs")
    runs.add_argument(
        "study", nargs="?", metavar="STUDY", help="folder of a study, or of its published results with training.json"
    )
    runs.add_argument("--runs", nargs="+", metavar="DIR", help="instead: output folders of maskft train")
    runs.add_argument("--what", metavar="A,B", help=f"of {', '.join(WHAT)} (default: all that the runs allow)")
    runs.add_argument("--output_dir", metavar="DIR", help="where the files go (default: STUDY/analysis)")
    runs.add_argument("--base", metavar="NAME", help="the base model whose runs are meant, where there are several")
    runs.add_argument("--mask", metavar="NAME", help="id or name of the mask for bound, landscape and curvature")
    runs.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME",
        help="landscape, curvature: other runs of the mask's seed to show beside it, by id or name, such as a restart",
    )
    runs.add_argument("--setting", metavar="NAME", help="the setting that ablations are about (default: each varied)")
    rows = parser.add_argument_group("rows on which losses are taken (landscape, curvature, effects of masks)")
    rows.add_argument("--rows", metavar="DIR", help="folder of tokenised rows (default: the study's)")
    rows.add_argument("--num_rows", type=int, default=64, help="rows of each split (default: 64)")
    rows.add_argument("--batch_size", type=int, default=8, help="rows of one forward pass (default: 8)")
    rows.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    rows.add_argument("--seed", type=int, default=0, help="of rows, directions and probes (default: 0)")
    more = parser.add_argument_group("one analysis each")
    more.add_argument("--grid", type=int, default=21, help="landscape: points of an axis, odd (default: 21)")
    more.add_argument(
        "--span", type=float, default=1.0, help="landscape: half an axis, in lengths of filters (default: 1.0)"
    )
    more.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="landscape: of the weights"
    )
    more.add_argument("--num_probes", type=int, default=16, help="curvature: random vectors per trace (default: 16)")
    more.add_argument("--num_eigenvalues", type=int, default=1, help="curvature: largest ones (default: 1)")
    more.add_argument("--bits", default="8,16", help="bound: bits of a weight (default: 8,16)")
    more.add_argument("--delta", type=float, default=0.05, help="bound: probability of failure, 0 to 1 (default: 0.05)")


def run(args: argparse.Namespace) -> None:
    """Make each analysis that was asked for, or all that the runs allow."""
    from maskft_base.runtime import silence

    from ..analysis.runs import read_runs, read_study, select_base

    if (args.study is None) == (args.runs is None):
        raise UserError("name the folder of a study, or --runs with folders of maskft train")
    if args.runs and not args.output_dir:
        raise UserError("--runs needs --output_dir, the folder in which the files are to go")
    for name in ("num_rows", "batch_size", "num_probes", "num_eigenvalues"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; give 1 or more")
    wanted = _wanted(args.what)
    runs = select_base(read_runs(args.runs) if args.runs else read_study(args.study), args.base)
    folder = Path(args.output_dir or Path(args.study) / ANALYSIS)
    if set(wanted) & set(OF_MODELS):
        from ..evaluation.load import usable_device

        usable_device(args.device)
        silence()
    problems = []
    for what in wanted:
        file = folder / f"{what}.json"
        try:
            _ANALYSES[what](args, runs, file)
        except UserError as error:
            if args.what:
                raise
            problems.append(f"{what}: {error}")
            print(f"left out {what}: {error}")
        else:
            print(f"{what}: {file}")
    if len(problems) == len(wanted):
        raise UserError(f"these runs allow no analysis; {problems[0]}")


def _wanted(what: str | None) -> list[str]:
    names = [name.strip() for name in (what or ",".join(WHAT)).split(",") if name.strip()]
    for name in names:
        if name not in WHAT:
            raise UserError(f"--what: no analysis {name!r}{did_you_mean(name, WHAT)}; there are {', '.join(WHAT)}")
    return names


def _curves(args, runs, file: Path) -> None:
    from ..analysis.curves import analyse_curves

    analyse_curves(file, runs)


def _cost(args, runs, file: Path) -> None:
    from ..analysis.curves import analyse_cost

    analyse_cost(file, runs)


def _ablations(args, runs, file: Path) -> None:
    from ..analysis.ablations import analyse_ablations

    analyse_ablations(file, runs, args.setting)


def _bound(args, runs, file: Path) -> None:
    from ..analysis.bound import analyse_bound, stable_training_loss
    from ..analysis.losses import count_parameters
    from ..analysis.runs import BEST, find_mask, full_run, start_model

    mask = find_mask(runs, args.mask)
    full = full_run(mask, runs)
    losses = tuple(stable_training_loss(run.history, run.summary["best_step"]) for run in (full, mask))
    bits = [float(each) if each.strip().isdecimal() else 0.0 for each in args.bits.split(",")]
    if min(bits) < 1:
        raise UserError(f"--bits is {args.bits}; give whole numbers from 1 on, separated by commas, such as 8,16")
    num_weights, vocab_size = count_parameters(start_model(mask, runs))
    analyse_bound(
        file,
        mask.models[BEST],
        losses,
        num_weights,
        mask.data.get("train"),
        bits=bits,
        delta=args.delta,
        vocab_size=vocab_size,
    )


def _masks(args, runs, file: Path) -> None:
    from ..analysis.masks import analyse_masks
    from ..analysis.runs import BEST, MASK, find_mask, start_model

    rows = _rows(args, find_mask(runs, args.mask))["heldout"]
    masks = [run for run in runs if run.method.endswith(MASK) and BEST in run.models]
    adapters = {run.id: (run.models[BEST], start_model(run, runs)) for run in masks}
    histories = {run.id: run.history for run in masks}
    analyse_masks(file, adapters, histories, rows, batch_size=args.batch_size, device=args.device)


def _landscape(args, runs, file: Path) -> None:
    from ..analysis.landscape import CONTINUED, FFT, MASK, analyse_landscape
    from ..analysis.points import Point
    from ..analysis.runs import BEST, continued_model, find_mask, full_run, has_continued

    mask = find_mask(runs, args.mask)
    full, others = full_run(mask, runs), _against(args, runs, mask)
    if not others or has_continued(full):
        others = {CONTINUED: Point(continued_model(full)), **others}
    first, best = next(iter(others)), full.models[BEST]  # the first stands with FFT and mask in the plane
    points = {FFT: Point(best), first: others.pop(first), MASK: Point(best, mask.models[BEST])}
    options = {key: getattr(args, key) for key in ("grid", "span", "seed", "batch_size", "dtype", "device")}
    analyse_landscape(file, points | others, _rows(args, mask), **options)


def _curvature(args, runs, file: Path) -> None:
    from ..analysis.curvature import analyse_curvature
    from ..analysis.runs import BEST, find_mask, start_model

    mask = find_mask(runs, args.mask)
    options = {key: getattr(args, key) for key in ("num_probes", "num_eigenvalues", "seed", "batch_size", "device")}
    options["others"] = _against(args, runs, mask)
    analyse_curvature(file, start_model(mask, runs), mask.models[BEST], _rows(args, mask)["train"], **options)


def _against(args, runs, mask) -> dict:
    from ..analysis.points import Point
    from ..analysis.runs import BEST, MASK, find_run, start_model

    taken = ("fft", "continued", MASK)  # names that a landscape gives
    found = {name: find_run(name, runs, mask.seed) for name in args.against}
    found = {run.id if name in taken else name: run for name, run in found.items()}
    return {
        name: Point(start_model(run, runs), run.models[BEST]) if run.method.endswith(MASK) else Point(run.models[BEST])
        for name, run in found.items()
    }


def _rows(args, mask) -> dict[str, list[dict]]:
    from ..analysis.losses import load_rows, rows_folder

    folder = rows_folder(Path(args.study) if args.study else None, args.rows, mask.data)
    return load_rows(folder, args.num_rows, args.seed)


_ANALYSES = {
    "curves": _curves,
    "cost": _cost,
    "ablations": _ablations,
    "bound": _bound,
    "masks": _masks,
    "landscape": _landscape,
    "curvature": _curvature,
}
