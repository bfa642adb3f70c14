"""``maskft search``: choose a mask's layer group and sparsity without looking at test items."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft search``."""
    parser.add_argument("recipe", metavar="RECIPE", help="the search's YAML file; docs/studies.md describes it")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder of the search (default: runs/NAME); finished probes in it are not repeated",
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder with the data file that the recipe names")
    parser.add_argument("--model", metavar="MODEL", help="model to mask instead of the recipe's, e.g. a local folder")
    parser.add_argument("--dry_run", action="store_true", help="list rungs, candidates and steps; run nothing")


def run(args: argparse.Namespace) -> None:
    """Check the recipe, then list or run the probes."""
    from ..study.search import print_rungs, run_search
    from ..study.search_recipe import load_search
    from . import study

    search = load_search(args.recipe, args.data_dir, args.model)
    check = partial(study.check, allow_many=True)  # the budget bounds the probes
    check(search.rung(search.candidates, search.steps[0]))
    if args.dry_run:
        print_rungs(search)
    else:
        run_search(search, args.output_dir or Path("runs") / search.recipe.name, check)
