"""``maskft study``: run everything that a recipe describes, and compare it."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from maskft_base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from maskft.training.arguments import TrainConfig

    from ..study.plan import Plan, StudyRun
    from ..study.recipe import Recipe

_ANY = ["--output_dir", "any", "--model_name_or_path", "any", "--change", "none"]
LAUNCHERS = ("local", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft study``."""
    parser.add_argument("recipe", metavar="RECIPE", help="the study's YAML file; docs/studies.md describes it")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder of the study (default: runs/NAME); finished runs in it are not repeated",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder with the data files that the recipe names")
    parser.add_argument("--model", metavar="MODEL", help="base model instead of the recipe's, e.g. a local folder")
    parser.add_argument(
        "--dry_run", action="store_true", help="list runs, what each is made from, tokens, memory and time; run nothing"
    )
    parser.add_argument("--yes", action="store_true", help="run a grid of more than 1,000 runs")
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="local",
        help="local: here; ray: as many at once as the cluster has room for (default: local)",
    )
    parser.add_argument(
        "--num_at_once",
        type=int,
        default=1,
        metavar="N",
        help="with launcher local: runs at a time, which share the cores; for models too small to keep them busy "
        "(default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    """Check the recipe, expand it, then list or run it."""
    from ..study.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.data_dir)
    if args.model:
        recipe = with_model(recipe, args.model)
    plan = check(recipe, allow_many=args.yes)
    folder = args.output_dir or Path("runs") / recipe.name
    if args.dry_run:
        from ..study.dry_run import print_dry_run

        _check_layers(plan, [model for model in recipe.models if Path(model).is_dir()])  # it downloads nothing
        print_dry_run(plan, folder)
    else:
        start(plan, folder, args.launcher, args.num_at_once)


def with_model(recipe: Recipe, model: str) -> Recipe:
    """The recipe on another base model, of which it knows no facts."""
    from ..study.recipe import Facts

    return recipe.model_copy(update={"models": [model], "facts": Facts(flops_per_s=recipe.facts.flops_per_s)})


def start(
    plan: Plan, folder: str | Path, launcher: str = "local", num_at_once: int = 1, is_brief: bool = False
) -> None:
    """Run a study whose recipe has been checked; what is wrong with its evaluation would be found after days."""
    from maskft_base.runtime import silence

    from ..study.launchers import Launcher
    from ..study.study import run_study
    from . import evaluate

    silence()
    _check_layers(plan, plan.recipe.models)
    if launcher == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--launcher ray needs Ray; run: pip install 'maskft[ray]'")
    if num_at_once < 1 or (num_at_once > 1 and launcher == "ray"):
        raise UserError(f"num_at_once is {num_at_once}; it must be at least 1, and a Ray cluster decides it itself")
    try:
        reported = [row for args in _evaluation_args(plan.recipe) for row in evaluate.check_inputs(args)]
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    _check_tuned_rows(plan, reported)
    run_study(plan, folder, Launcher(launcher, num_at_once), is_brief=is_brief)


def check(recipe: Recipe, allow_many: bool = False) -> Plan:
    """Expand a recipe and put every option through the parser of the command it is for."""
    from ..study.plan import build_plan, check_layers
    from . import train

    launch = recipe.launch
    if launch.accelerate_config and not launch.num_processes:
        from maskft.training.launch import config_processes

        # How many share a batch is part of a run's name, also where the configuration says it.
        launch = launch.model_copy(update={"num_processes": config_processes(launch.accelerate_config)})
        recipe = recipe.model_copy(update={"launch": launch})
    plan = build_plan(recipe, train.option_defaults(), allow_many)
    seen: set[tuple[str, str, str]] = set()
    for planned in plan.runs:
        # One parse of all options of a run checks each of them; only values that are new need another.
        values = {(planned.method.name, name, repr(value)) for name, value in planned.options.items()}
        if values - seen:
            _check_run(planned, recipe.launch.num_processes or 1)
        seen |= values
    check_layers(plan.runs, recipe.facts.num_layers)
    _evaluation_args(recipe)
    return plan


def _parsed(planned: StudyRun) -> TrainConfig:
    from ..study.process import command_words
    from ..study.recipe import CURRENT_RATE
    from . import train

    options = {"method": planned.method.method, "model_name_or_path": planned.model, **planned.options}
    if options.get("learning_rate") == CURRENT_RATE:
        del options["learning_rate"]
    if planned.takes_values_before:
        options["mask_removed_value_model"] = planned.model  # known once its parent is made
    return train.parse(command_words(options))


def _check_run(planned: StudyRun, num_processes: int) -> None:
    from maskft.data.arguments import check_sizes
    from maskft.training.checks import check_choice, check_method, check_size
    from maskft.training.method_arguments import FIXED_MASK_METHODS, MASK_METHODS, mask_config

    try:
        parsed = _parsed(planned)
        check_method(parsed.method)
        check_sizes(parsed.data)
        if planned.method.method in MASK_METHODS:
            config = mask_config(parsed.mask)
            if planned.method.method in FIXED_MASK_METHODS:
                check_size(planned.method.method, config)
        check_choice(parsed, num_processes)
    except UserError as error:
        raise UserError(f"run {planned.title!r}: {error}") from None


def _check_tuned_rows(plan: Plan, reported: list[dict]) -> None:
    """Refuse to tune or choose on rows of files whose prompts are among those that the study reports on."""
    from maskft.data import load_splits
    from maskft.data.arguments import DataArguments
    from maskft.data.splits import prompt_digest

    from ..study.tuning import data_sets, how_chosen

    digests, seen = {prompt_digest(row) for row in reported}, set()
    about_data = {field.name for field in fields(DataArguments)}
    for planned in plan.runs:
        verb = how_chosen(planned.method, planned.options)
        if verb is None:
            continue
        of_data = repr(sorted((name, value) for name, value in planned.options.items() if name in about_data))
        if of_data in seen:
            continue
        seen.add(of_data)
        parsed = _parsed(planned)
        files = [*data_sets(parsed.data.dataset_name).values(), *data_sets(parsed.data.eval_dataset_name).values()]
        if not files or not all(Path(name).is_file() for name in files):
            continue
        heldout = load_splits(parsed.data, parsed.data.split_seed, None, parsed.training.dataset_text_field).heldout
        number = sum(prompt_digest(row) in digests for row in heldout)
        if number:
            raise UserError(
                f"method {planned.method.name!r} would be {verb} on {len(heldout):,} held-out rows, and evaluation "
                f"reports on the prompts of {number:,} of them; hold out other rows, or take these out of the test"
            )


def _check_layers(plan: Plan, models: list[str]) -> None:
    from maskft.models import load_config

    from ..study.plan import check_layers

    for model in models:
        config = load_config(model, revision=plan.recipe.revision)
        check_layers([run for run in plan.runs if run.model == model], config.get_text_config().num_hidden_layers)


def _evaluation_args(recipe: Recipe) -> list[argparse.Namespace]:
    """The recipe's options of ``maskft evaluate``, parsed; what that would refuse is refused."""
    before = {f"evaluation.before.{name}": options for name, options in recipe.before.items()}
    before |= {f"path.before.{name}": options for name, options in (recipe.path.before if recipe.path else {}).items()}
    return [_parsed_evaluation(*given) for given in ({"evaluation": recipe.evaluation} | before).items()]


def _parsed_evaluation(where: str, options: dict) -> argparse.Namespace:
    from ..study.execute import evaluation_words
    from . import evaluate
    from .main import OneLineParser

    parser = OneLineParser(prog="maskft evaluate", allow_abbrev=False)
    evaluate.add_arguments(parser)
    ours = {"model_name_or_path", "adapter", "change", "scale", "name", "seed", "output_dir", "overwrite", "help"}
    known = {action.dest for action in parser._actions} - ours
    for option in options:
        if option not in known:
            raise UserError(f"{where} has an unknown option {option!r}{did_you_mean(option, known)}")
    try:
        args = parser.parse_args([*_ANY, *evaluation_words(options)])
        evaluate.read(args)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return args
