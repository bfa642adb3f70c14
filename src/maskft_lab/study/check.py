"""A recipe's options, put through the parser of the command that each is for, before anything runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

from maskft.data.arguments import DataArguments, check_sizes
from maskft.data.mixtures import hub_ids
from maskft.data.splits import load_splits, prompt_digest
from maskft.training.arguments import TrainConfig
from maskft.training.checks import check_method, check_size
from maskft.training.launch import config_processes, launch_options
from maskft.training.method_arguments import FIXED_MASK_METHODS, INTERPOLATE, MASK_METHODS, mask_config
from maskft.training.options import option_defaults, parse_words
from maskft_common.errors import UserError, did_you_mean

from .execute import Study, evaluation_words
from .identity import options_identity, short_digest
from .plan import Plan, build_plan
from .process import command_words
from .recipe import CURRENT_RATE, Method, Options, Recipe
from .runs import StudyRun

_OF_THE_STUDY = set("model_name_or_path adapter change scale name seed output_dir overwrite help".split())
_OF_PATH = "path.before."  # begins the name of a section
_ANY = ["--output_dir", "any", "--model_name_or_path", "any", "--change", "none"]


def check(recipe: Recipe, evaluate: ModuleType) -> Plan:
    """Expand a recipe and put every option through the parser of the command it is for.

    Args:
        recipe: The recipe.
        evaluate: The module of ``maskft evaluate``, with its ``parser``, ``read`` and ``check_inputs``.

    Raises:
        UserError: The first mistake.
    """
    launch = recipe.launch
    if launch.accelerate_config and not launch.num_processes:
        # How many share a batch is part of a run's name, also where the configuration says it.
        launch = launch.model_copy(update={"num_processes": config_processes(launch.accelerate_config)})
        recipe = recipe.model_copy(update={"launch": launch})
    plan = build_plan(recipe)
    seen: set[tuple[str, str, str]] = set()
    for run in plan.runs:
        # One parse of all options of a run checks each of them; only values that are new need another.
        values = {(run.method.name, name, repr(value)) for name, value in run.options.items()}
        if values - seen:
            _check_run(run, recipe)
        seen |= values
    _evaluation_args(recipe, evaluate)
    _check_path_rows(plan)
    return plan


def parsed_run(run: StudyRun) -> TrainConfig:
    """What the options of a run configure."""
    options = {"method": run.method.method, "model_name_or_path": run.model, **run.options}
    if options.get("learning_rate") == CURRENT_RATE:
        del options["learning_rate"]
    if run.takes_values_before:
        options["mask_removed_value_model"] = run.model  # known once its parent is made
    known = (defaults := option_defaults()).keys() | launch_options()
    for name, value in options.items():
        is_number = type(defaults.get(name)) in (int, float)
        if is_number and isinstance(value, str) and value.replace(".", "", 1).isdigit():
            raise UserError(f"{name} is {value!r}, a text; write the number without quotes")
    for name in options.keys() - known:
        keys = [spec.alias or key for key, spec in Method.model_fields.items()]
        raise UserError(
            f"unknown key {name!r}{did_you_mean(name, [*keys, *known])}; options are in maskft train --help"
        )
    return parse_words(command_words(options))[0]


def _check_run(run: StudyRun, recipe: Recipe) -> None:
    try:
        parsed = parsed_run(run)
        check_method(parsed.method)
        check_sizes(parsed.data)
        saved = parsed.training.save_steps / (parsed.training.max_steps if parsed.training.save_steps >= 1 else 1)
        for share in recipe.path.checkpoints if recipe.path and 0 < saved < 1 else ():
            if share < 1 and abs(share / saved - round(share / saved)) > 1e-6:
                raise UserError(f"path.checkpoints has {share:g}, and save_steps does not divide it; let it")
        if run.method.method in MASK_METHODS:
            config = mask_config(parsed.mask)
            if run.method.method in FIXED_MASK_METHODS:
                check_size(run.method.method, config)
    except UserError as error:
        raise UserError(f"run {run.title!r}: {error}") from None


def _check_path_rows(plan: Plan) -> None:
    """Refuse a path on held-out rows on which the model before training is not measured."""
    study, rows = Study(Path(), plan.recipe), {}
    for run in filter(study.has_path, plan.runs):
        rows.setdefault(short_digest(options_identity(study.heldout_options(run))), run.title)
    if len(rows) > 1:
        raise UserError(
            f"path: {' and '.join(map(repr, [*rows.values()][:2]))} have different held-out rows; give all methods the "
            f"first of data, {next(iter(plan.recipe.data))!r}, and options of its rows there or in train"
        )


def check_before_running(plan: Plan, evaluate: ModuleType) -> None:
    """Check what needs data: tasks, and that nothing is chosen on rows that are reported on."""
    sets = _evaluation_args(plan.recipe, evaluate)
    try:
        rows = {where: evaluate.check_inputs(args) for where, args in sets.items()}
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    digests = {prompt_digest(row) for where, each in rows.items() if not where.startswith(_OF_PATH) for row in each}
    _check_tuned_rows(plan, digests)
    for where, each in rows.items() if plan.recipe.path and plan.recipe.path.choose else ():
        if where.startswith(_OF_PATH) and not sets[where].kl:  # KL chooses nothing
            _check_not_reported(each, digests, f"{where} would choose points on")


def _check_tuned_rows(plan: Plan, digests: set[str]) -> None:
    """Refuse to tune or choose on rows whose prompts are among those that the study reports on, or on a test split."""
    seen: set[str] = set()
    about_data = {field.name for field in fields(DataArguments)}
    for run in plan.runs:
        verb = how_chosen(run.method, run.options)
        of_data = repr(sorted((name, value) for name, value in run.options.items() if name in about_data))
        if verb is None or of_data in seen:
            continue
        seen.add(of_data)
        parsed = parsed_run(run)
        data, would = parsed.data, f"method {run.method.name!r} would be {verb} on"
        name = data.eval_dataset_name or data.dataset_name
        split = data.dataset_eval_split or ("test" if data.eval_dataset_name else data.dataset_train_split)
        if "test" in {part.partition("[")[0].strip() for part in split.split("+")} and hub_ids(name):
            raise UserError(f"{would} the split {split!r} of {name!r}; hold out rows of the training data")
        heldout = load_splits(data, data.split_seed, None, parsed.training.dataset_text_field).heldout
        _check_not_reported(heldout, digests, would)


def _check_not_reported(heldout: Iterable[dict], digests: set[str], would: str) -> None:
    is_reported = [prompt_digest(row) in digests for row in heldout]
    if any(is_reported):
        raise UserError(
            f"{would} {len(is_reported):,} held-out rows, and evaluation reports on the prompts of "
            f"{sum(is_reported):,} of them; hold out other rows (eval_split_size), or take these out of the test"
        )


def how_chosen(method: Method, options: Options) -> str | None:
    """``tuned`` or ``chosen`` where held-out rows choose more of a method than its checkpoint, None where they do not.

    Args:
        method: The method.
        options: Its options of ``maskft train``, those of all methods included.
    """
    if method.tune is not None:
        return "tuned"
    is_best_drawn = method.method == "random_mask" and options.get("num_candidates", 1) > 1
    return "chosen" if is_best_drawn or method.method == INTERPOLATE else None


def _evaluation_args(recipe: Recipe, evaluate: ModuleType) -> dict[str, Namespace]:
    """Section -> the recipe's options of ``maskft evaluate``, parsed; what that would refuse is refused."""
    sections = {"evaluation": recipe.evaluation}
    sections |= {f"evaluation.before.{name}": options for name, options in recipe.before.items()}
    before = recipe.path.before if recipe.path else {}
    sections |= {f"{_OF_PATH}{name}": options for name, options in before.items()}
    found, parser = dict[str, Namespace](), evaluate.parser()
    known = {action.dest for action in parser._actions} - _OF_THE_STUDY
    for where, options in sections.items():
        taken = known - ({"tasks"} if where.startswith(_OF_PATH) else set())  # points are measured on rows
        for option in options:
            if option not in taken:
                raise UserError(f"{where} has an unknown option {option!r}{did_you_mean(option, taken)}")
        try:
            found[where] = parser.parse_args([*_ANY, *evaluation_words(options)])
            evaluate.read(found[where])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return found
