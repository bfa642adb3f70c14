"""A recipe's options, put through the parser of the command that each is for, before anything runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from maskft.data import load_splits
from maskft.data.arguments import DataArguments, check_sizes
from maskft.data.splits import prompt_digest
from maskft.models import load_config
from maskft.training.arguments import TrainConfig
from maskft.training.checks import check_method, check_size
from maskft.training.launch import config_processes
from maskft.training.method_arguments import FIXED_MASK_METHODS, MASK_METHODS, mask_config
from maskft.training.options import option_defaults, parse_words
from maskft_base.errors import UserError, did_you_mean

from .execute import evaluation_words
from .plan import Plan, StudyRun, build_plan, check_layers
from .process import command_words
from .recipe import CURRENT_RATE, Facts, Recipe
from .tuning import data_sets, how_chosen

_OF_THE_STUDY = set("model_name_or_path adapter change scale name seed output_dir overwrite help".split())
_ANY = ["--output_dir", "any", "--model_name_or_path", "any", "--change", "none"]


class Evaluation(Protocol):
    """How ``maskft evaluate`` reads its options: its parser, and what checks what was parsed."""

    def parser(self) -> Any:
        """The parser of its options."""

    def read(self, args: Namespace) -> Any:
        """Refuse options that do not fit each other."""

    def check_inputs(self, args: Namespace) -> list[dict]:
        """Read tasks and data; returns the held-out rows."""


def check(recipe: Recipe, evaluation: Evaluation, allow_many: bool = False) -> Plan:
    """Expand a recipe and put every option through the parser of the command it is for.

    Raises:
        UserError: The first mistake.
    """
    launch = recipe.launch
    if launch.accelerate_config and not launch.num_processes:
        # How many share a batch is part of a run's name, also where the configuration says it.
        launch = launch.model_copy(update={"num_processes": config_processes(launch.accelerate_config)})
        recipe = recipe.model_copy(update={"launch": launch})
    plan = build_plan(recipe, option_defaults(), allow_many)
    seen: set[tuple[str, str, str]] = set()
    for run in plan.runs:
        # One parse of all options of a run checks each of them; only values that are new need another.
        values = {(run.method.name, name, repr(value)) for name, value in run.options.items()}
        if values - seen:
            _check_run(run)
        seen |= values
    check_layers(plan.runs, recipe.facts.num_layers)
    evaluation_args(recipe, evaluation)
    return plan


def with_model(recipe: Recipe, model: str) -> Recipe:
    """The recipe on another base model, of which it knows no facts."""
    return recipe.model_copy(update={"models": [model], "facts": Facts(flops_per_s=recipe.facts.flops_per_s)})


def parsed_run(run: StudyRun) -> TrainConfig:
    """What the options of a run configure."""
    options = {"method": run.method.method, "model_name_or_path": run.model, **run.options}
    if options.get("learning_rate") == CURRENT_RATE:
        del options["learning_rate"]
    if run.takes_values_before:
        options["mask_removed_value_model"] = run.model  # known once its parent is made
    return parse_words(command_words(options))[0]


def _check_run(run: StudyRun) -> None:
    try:
        parsed = parsed_run(run)
        check_method(parsed.method)
        check_sizes(parsed.data)
        if run.method.method in MASK_METHODS:
            config = mask_config(parsed.mask)
            if run.method.method in FIXED_MASK_METHODS:
                check_size(run.method.method, config)
    except UserError as error:
        raise UserError(f"run {run.title!r}: {error}") from None


def check_before_running(plan: Plan, evaluation: Evaluation) -> None:
    """Check what needs models or data: layers, tasks, and that nothing is chosen on rows that are reported on."""
    check_model_layers(plan, plan.recipe.models)
    try:
        reported = [row for args in evaluation_args(plan.recipe, evaluation) for row in evaluation.check_inputs(args)]
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    _check_tuned_rows(plan, reported)


def check_model_layers(plan: Plan, models: Sequence[str]) -> None:
    """Refuse layers that a model does not have."""
    for model in models:
        config = load_config(model, revision=plan.recipe.revision)
        check_layers([run for run in plan.runs if run.model == model], config.get_text_config().num_hidden_layers)


def _check_tuned_rows(plan: Plan, reported: list[dict]) -> None:
    """Refuse to tune or choose on rows of files whose prompts are among those that the study reports on."""
    digests, seen = {prompt_digest(row) for row in reported}, set()
    about_data = {field.name for field in fields(DataArguments)}
    for run in plan.runs:
        verb = how_chosen(run.method, run.options)
        of_data = repr(sorted((name, value) for name, value in run.options.items() if name in about_data))
        if verb is None or of_data in seen:
            continue
        seen.add(of_data)
        parsed = parsed_run(run)
        files = [*data_sets(parsed.data.dataset_name).values(), *data_sets(parsed.data.eval_dataset_name).values()]
        if not files or not all(Path(name).is_file() for name in files):
            continue
        heldout = load_splits(parsed.data, parsed.data.split_seed, None, parsed.training.dataset_text_field).heldout
        number = sum(prompt_digest(row) in digests for row in heldout)
        if number:
            raise UserError(
                f"method {run.method.name!r} would be {verb} on {len(heldout):,} held-out rows, and evaluation "
                f"reports on the prompts of {number:,} of them; hold out other rows, or take these out of the test"
            )


def evaluation_args(recipe: Recipe, evaluation: Evaluation) -> list[Namespace]:
    """The recipe's options of ``maskft evaluate``, parsed; what that would refuse is refused."""
    sections = {"evaluation": recipe.evaluation}
    sections |= {f"evaluation.before.{name}": options for name, options in recipe.before.items()}
    before = recipe.path.before if recipe.path else {}
    sections |= {f"path.before.{name}": options for name, options in before.items()}
    found = []
    for where, options in sections.items():
        parser = evaluation.parser()
        known = {action.dest for action in parser._actions} - _OF_THE_STUDY
        for option in options:
            if option not in known:
                raise UserError(f"{where} has an unknown option {option!r}{did_you_mean(option, known)}")
        try:
            found.append(parser.parse_args([*_ANY, *evaluation_words(options)]))
            evaluation.read(found[-1])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return found
