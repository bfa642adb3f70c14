"""``maskft study``: run everything that a recipe describes, and compare it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import UserError

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
        help="local: one run after another here; ray: as many at once as the cluster has room for (default: local)",
    )


def run(args: argparse.Namespace) -> None:
    """Check the recipe, expand it, then list or run it."""
    from ..study.plan import check_layers
    from ..study.recipe import Facts, load_recipe

    recipe = load_recipe(args.recipe, args.data_dir)
    if args.model:
        recipe = replace(recipe, models=(args.model,), facts=Facts(flops_per_s=recipe.facts.flops_per_s))
    plan = check(recipe, allow_many=args.yes)
    for model in recipe.models:
        if not args.dry_run or Path(model).is_dir():  # a dry run downloads nothing
            from ..models import load_config

            config = load_config(model, revision=recipe.revision)
            check_layers(plan, model, config.get_text_config().num_hidden_layers)
    folder = Path(args.output_dir or Path("runs") / recipe.name)
    if args.launcher == "ray":
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            raise UserError("--launcher ray needs Ray; run: pip install 'maskft[ray]'")
    from ..study.run import dry_run, run_study

    if args.dry_run:
        dry_run(plan, folder)
        return
    from . import evaluate

    try:
        evaluate.check_inputs(_evaluation_args(recipe))  # what is wrong with them would be found after days
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    run_study(plan, folder, args.launcher)


def check(recipe, allow_many: bool = False):
    """Expand a recipe and put every option through the parser of the command it is for; returns the plan."""
    from ..study.plan import build_plan
    from ..study.process import command_words
    from . import train

    if recipe.launch.accelerate_config:
        from ..training.launch import config_processes

        # How many share a batch is part of a run's name, also where the configuration says it.
        processes = recipe.launch.num_processes or config_processes(recipe.launch.accelerate_config)
        recipe = replace(recipe, launch=replace(recipe.launch, num_processes=processes))
    plan = build_plan(recipe, train.option_defaults(), allow_many)
    seen = set()
    for run in plan.runs:
        for name, value in run.options.items():
            key = (run.method.name, name, repr(value))
            if key in seen:
                continue
            # One parse of all options of a run checks each of them; only values that are new need another.
            seen |= {(run.method.name, other, repr(v)) for other, v in run.options.items()}
            _parse_run(train, run, command_words)
            break
    _evaluation_args(recipe)
    return plan


def _parse_run(train, run, command_words) -> None:
    from ..data.arguments import check_sizes
    from ..study.recipe import CURRENT_RATE, PRETRAINED
    from ..training.checks import check_method
    from ..training.method_arguments import MASK_METHODS, mask_config

    if run.method.method == PRETRAINED:
        return
    options = {"method": run.method.method, "model_name_or_path": run.model, **run.options}
    if options.get("learning_rate") == CURRENT_RATE:
        del options["learning_rate"]
    try:
        parsed = train.parse(command_words(options))
        check_method(parsed.method)
        check_sizes(parsed.data)
        if run.method.method in MASK_METHODS:
            mask_config(parsed.mask)
    except UserError as error:
        raise UserError(f"run {run.title!r}: {error}") from None


def _evaluation_args(recipe) -> argparse.Namespace:
    """The recipe's options of ``maskft evaluate``, parsed; what that would refuse is refused."""
    from ..errors import did_you_mean
    from ..study.execute import evaluation_words
    from . import evaluate
    from .main import OneLineParser

    parser = OneLineParser(prog="maskft evaluate", allow_abbrev=False)
    evaluate.add_arguments(parser)
    ours = {"model_name_or_path", "adapter", "name", "seed", "output_dir", "overwrite", "help"}
    known = {action.dest for action in parser._actions} - ours
    for option in recipe.evaluation:
        if option not in known:
            raise UserError(f"evaluation has an unknown option {option!r}{did_you_mean(option, known)}")
    try:
        args = parser.parse_args(["--output_dir", "any", *evaluation_words(recipe.evaluation)])
        evaluate.read(args)
    except UserError as error:
        raise UserError(f"evaluation: {error}") from None
    return args
