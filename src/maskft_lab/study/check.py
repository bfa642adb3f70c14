"""Checking a recipe before anything runs: every option goes through the parser of the command it is for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from maskft.data.arguments import DataArguments, check_sizes
from maskft.data.mixtures import hub_ids
from maskft.data.splits import load_splits, prompt_digest
from maskft.training.checks import check_method, check_size
from maskft.training.launch import config_processes
from maskft.training.method_arguments import FIXED_MASK_METHODS, INTERPOLATE, MASK_METHODS, mask_config
from maskft_common.errors import UserError, did_you_mean

from ..evaluation import command_line as evaluate
from .identity import options_identity, short_digest
from .make import evaluation_words
from .path import has_path, heldout_options
from .plan import Plan, build_plan
from .recipe import Method, Options, Recipe
from .run_options import SEEDS, parsed_run
from .study_run import StudyRun

# Options of `maskft evaluate` that the study itself sets.
_OF_THE_STUDY = set("models model_name_or_path adapter change scale name seed output_dir overwrite help".split())
_PLACE_HOLDERS = ["--output_dir", "any", "--model_name_or_path", "any", "--change", "none"]
_OF_PATH = "path.before."  # begins the name of a section


def checked_plan(recipe: Recipe) -> Plan:
    """Expand a recipe, and check every option of every run and evaluation.

    Raises:
        UserError: The first mistake.
    """
    recipe = _with_num_processes(recipe)
    plan = build_plan(recipe)

    # One parse of all options of a run checks each of them, so only new values need another parse.
    seen: set[tuple[str, str, str]] = set()
    for run in plan.runs:
        values = {
            (run.method.name, name, repr(value)) for name, value in run.options.items() if not _is_seed(name, value)
        }
        if not values <= seen:
            _check_run(run, recipe)
        seen |= values

    _evaluation_args(recipe)
    _check_path_rows(plan)
    return plan


def _is_seed(name: str, value: Any) -> bool:
    """Whether an option is a valid seed, which differs in every run."""
    return name in SEEDS and type(value) is int and value >= 0


def _with_num_processes(recipe: Recipe) -> Recipe:
    """The recipe with the number of processes of its accelerate configuration: it is part of a run's name."""
    launch = recipe.launch
    if not launch.accelerate_config or launch.num_processes:
        return recipe
    launch = launch.model_copy(update={"num_processes": config_processes(launch.accelerate_config)})
    return recipe.model_copy(update={"launch": launch})


def _check_run(run: StudyRun, recipe: Recipe) -> None:
    try:
        parsed = parsed_run(run)
        check_method(parsed.method)
        check_sizes(parsed.data)
        if recipe.path:
            _check_checkpoints(recipe.path.checkpoints, parsed.training)
        if run.method.method in MASK_METHODS:
            config = mask_config(parsed.mask)
            if run.method.method in FIXED_MASK_METHODS:
                check_size(run.method.method, config)
    except UserError as error:
        raise UserError(f"run {run.title!r}: {error}") from None


def _check_checkpoints(shares: Iterable[float], training) -> None:
    """Check that a checkpoint is saved at every share of training."""
    interval = training.save_steps
    if interval >= 1:  # steps, of a length that may be unknown (max_steps -1)
        interval /= training.max_steps
    if not 0 < interval < 1:
        return
    for share in shares:
        num_intervals = share / interval
        if share < 1 and abs(num_intervals - round(num_intervals)) > 1e-6:
            raise UserError(f"path.checkpoints has {share:g}, which must be a multiple of save_steps")


def _check_path_rows(plan: Plan) -> None:
    """Check that the model before training is measured on the held-out rows of every run."""
    runs_by_rows: dict[str, str] = {}
    for run in plan.runs:
        if has_path(plan.recipe, run):
            rows = short_digest(options_identity(heldout_options(plan.recipe, run)))
            runs_by_rows.setdefault(rows, run.title)

    if len(runs_by_rows) > 1:
        first, second = list(runs_by_rows.values())[:2]
        raise UserError(
            f"path: {first!r} and {second!r} have different held-out rows; give all methods the first of data, "
            f"{plan.recipe.first_data!r}, and options of its rows there or in train"
        )


# Checks that read the data


def check_before_running(plan: Plan) -> None:
    """Check tasks and data, and that nothing is chosen on rows that are reported on."""
    sets = _evaluation_args(plan.recipe)
    try:
        rows = {where: evaluate.check_inputs(args) for where, args in sets.items()}
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None

    reported: set[str] = set()
    for where, rows_there in rows.items():
        if not where.startswith(_OF_PATH):
            reported |= {prompt_digest(row) for row in rows_there}

    _check_tuned_rows(plan, reported)
    path = plan.recipe.path
    if path is None or path.choose is None:
        return
    for where, rows_there in rows.items():
        chooses = where.startswith(_OF_PATH) and not sets[where].kl  # sets with kl have no loss to choose by
        if chooses:
            _check_not_reported(rows_there, reported, f"{where} would choose points on")


def _check_tuned_rows(plan: Plan, reported: set[str]) -> None:
    """Refuse to tune or choose on prompts that the study reports on, or on a test split."""
    data_options = {field.name for field in fields(DataArguments)}
    seen: set[str] = set()
    for run in plan.runs:
        verb = how_chosen(run.method, run.options)
        if verb is None:
            continue
        of_data = repr(sorted((name, value) for name, value in run.options.items() if name in data_options))
        if of_data in seen:
            continue
        seen.add(of_data)

        parsed = parsed_run(run)
        data = parsed.data
        would = f"method {run.method.name!r} would be {verb} on"
        _check_no_test_split(data, would)
        heldout = load_splits(data, data.split_seed, None, parsed.training.dataset_text_field).heldout
        _check_not_reported(heldout, reported, would)


def _check_no_test_split(data: DataArguments, would: str) -> None:
    name = data.eval_dataset_name or data.dataset_name
    default = "test" if data.eval_dataset_name else data.dataset_train_split
    split = data.dataset_eval_split or default
    parts = {part.partition("[")[0].strip() for part in split.split("+")}  # of test[:10%]+train
    if "test" in parts and hub_ids(name):
        raise UserError(f"{would} the split {split!r} of {name!r}; hold out rows of the training data")


def _check_not_reported(heldout: Iterable[dict], reported: set[str], would: str) -> None:
    is_reported = [prompt_digest(row) in reported for row in heldout]
    if any(is_reported):
        raise UserError(
            f"{would} {len(is_reported):,} held-out rows, and evaluation reports on the prompts of "
            f"{sum(is_reported):,} of them; hold out other rows (eval_split_size), or take these out of the test"
        )


def how_chosen(method: Method, options: Options) -> str | None:
    """``tuned`` or ``chosen`` if held-out rows choose more of a method than its checkpoint, else None.

    Args:
        method: The method.
        options: Its options of ``maskft train``, with those of all methods.
    """
    if method.tune is not None:
        return "tuned"
    is_best_drawn = method.method == "random_mask" and options.get("num_candidates", 1) > 1
    return "chosen" if is_best_drawn or method.method == INTERPOLATE else None


# Options of evaluations


def _evaluation_args(recipe: Recipe) -> dict[str, Namespace]:
    """Section -> its options of ``maskft evaluate``, parsed.

    Raises:
        UserError: For an option that ``maskft evaluate`` would refuse.
    """
    sections = {"evaluation": recipe.evaluation}
    for name, options in recipe.before.items():
        sections[f"evaluation.before.{name}"] = options
    for name, options in recipe.path.before.items() if recipe.path else ():
        sections[f"{_OF_PATH}{name}"] = options

    parser = evaluate.make_parser()
    known = {action.dest for action in parser._actions} - _OF_THE_STUDY
    parsed = {}
    for where, options in sections.items():
        allowed = known - {"tasks"} if where.startswith(_OF_PATH) else known  # points are measured on rows
        for option in options:
            if option not in allowed:
                raise UserError(f"{where} has an unknown option {option!r}{did_you_mean(option, allowed)}")
        try:
            parsed[where] = parser.parse_args([*_PLACE_HOLDERS, *evaluation_words(options)])
            evaluate.read(parsed[where])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return parsed
