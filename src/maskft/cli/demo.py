"""``maskft demo``: the packaged study ``recipes/demo.yaml`` on a small real model."""

from __future__ import annotations

import argparse
from importlib import resources

INTRO = """\
Fully fine-tunes a small language model on sums, learns a mask on the best
checkpoint, and compares it on new sums with its controls: the model before and
after fine-tuning, a random mask, an L1 mask, and more fine-tuning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft demo``."""
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        default="runs/demo",
        help="folder of the demo; an interrupted demo is resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model folder or hub name (default: the embedded SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--preset",
        choices=("paper",),
        help="paper: the mask as published, with a random start, ranked by magnitude, learning rate 1e-3",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="train and test on N sums only, for a quick look")
    parser.add_argument("--show", action="store_true", help="print the recipe, to begin a study of your own with")


def run(args: argparse.Namespace) -> None:
    """Change the recipe as the flags say, and run it as any study."""
    from ..errors import UserError
    from ..files import read_yaml
    from ..study.recipe import parse_recipe
    from . import study

    if args.limit is not None and args.limit < 2:
        raise UserError(f"limit is {args.limit}; it must be at least 2")
    with resources.as_file(resources.files("maskft") / "recipes" / "demo.yaml") as file:
        if args.show:
            print(file.read_text(encoding="utf-8"), end="")
            return
        content = read_yaml(file)
    if args.preset:
        own = {"mask_init_scores", "mask_rank_by", "mask_sparsity"}
        mask = {key: value for key, value in content["methods"]["learned mask"].items() if key not in own}
        content["methods"]["learned mask"] = mask | {"mask_preset": args.preset, "learning_rate": 1e-3}
    if args.limit:
        content["data"]["sums"] |= {"procedural_train_size": args.limit, "procedural_eval_size": args.limit}
        content["evaluation"]["heldout"]["procedural_eval_size"] = args.limit
    recipe = parse_recipe(content, source=file.name)
    if args.model:
        recipe = study.with_model(recipe, args.model)
    print(INTRO)
    study.start(study.check(recipe), args.output_dir)
