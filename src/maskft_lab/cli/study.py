"""``maskft study``: run everything that a recipe describes, and compare it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..study.launchers import Launcher
    from ..study.plan import Plan
    from ..study.recipe import Recipe


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
        "--dry_run", action="store_true", help="list runs, what each is made from, tokens and time; run nothing"
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
        help="with launcher local: runs at a time, which share the cores; for models too small to keep them busy "
        "(default: 1)",
    )
    parser.add_argument("--partition", metavar="NAME", help="with launcher slurm (default: the cluster's own)")
    parser.add_argument(
        "--time_min",
        type=int,
        metavar="N",
        help="with launcher slurm: time limit of a job in minutes; it is then requeued and resumes (default: 1440)",
    )


def run(args: argparse.Namespace) -> None:
    """Check the recipe, expand it, then list or run it."""
    from maskft_common.quiet import silence
    from maskft_common.yaml_file import read_yaml

    from ..study.launchers import launcher_of
    from ..study.recipe import load_recipe

    silence()
    launcher = launcher_of(args.launcher, args.num_at_once, args.partition, args.time_min)
    recipe = load_recipe(args.recipe, args.data_dir)
    if args.model:  # of whose speed nothing is known
        recipe = recipe.model_copy(update={"model": args.model, "tokens_per_s": None})
    plan = check(recipe)
    folder = Path(args.output_dir or Path("runs") / recipe.name)
    if not args.dry_run:
        start(plan, folder, launcher)
        words = ["maskft", "report", str(folder), "--study_name", recipe.name, "-o", str(folder / "report.html")]
        print(f"next: {shlex.join(words)}")
        return
    from ..study.dry_run import print_dry_run

    print_dry_run(plan, folder, read_yaml(args.recipe)["methods"])


def check(recipe: Recipe) -> Plan:
    """Expand a recipe and check every option of it."""
    from ..study.check import check as check_recipe
    from . import evaluate

    return check_recipe(recipe, evaluate)


def start(plan: Plan, folder: Path, launcher: Launcher, is_brief: bool = False) -> None:
    """Run a study whose recipe has been checked; what is wrong with its evaluation would be found after days."""
    from ..study.check import check_before_running
    from ..study.study import run_study
    from . import evaluate

    check_before_running(plan, evaluate)
    run_study(plan, folder, launcher, is_brief=is_brief)
