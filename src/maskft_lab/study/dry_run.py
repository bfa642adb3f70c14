"""``maskft study --dry_run``: what would run, from what, and what it takes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskft.data import load_splits, tokenize_dataset
from maskft.models import load_config, load_tokenizer
from maskft.training.method_arguments import PEFT, UNTRAINED_METHODS
from maskft_base import files
from maskft_base.runtime import time_text

from ..estimate.ledger import layer_passes, num_train_rows
from .check import parsed_run
from .execute import EMBEDDED_MODEL, Study
from .plan import Plan, StudyRun
from .process import PYTHON, command_words, run_command
from .recipe import PRETRAINED, Data, Facts
from .tuning import MAX_DOUBLINGS, data_sets, settings_text

_ROWS_READ = 200  # of local data, for their mean length
NUM_MEASURED_STEPS = 10


def print_dry_run(plan: Plan, folder: Path, own: Collection[str], console: Console | None = None) -> None:
    """Print what would run, from what, and what it takes; writes nothing.

    Args:
        plan: The runs.
        folder: Of the study.
        own: Methods that stand in the recipe's file; the others are controls.
        console: Where to print; default stdout.
    """
    console = console or Console()
    study = Study(folder.absolute(), plan.recipe)
    plan = with_local_facts(plan.again(study.heldout))
    stages = ["stage"] if plan.tunings else []
    table = Table(*stages, "run", "from", "tokens", "time", "state", title=plan.recipe.name)
    costs = {run.id: cost_of(plan, run) for run in plan.runs}
    for run in plan.runs:
        state = "finished" if study.is_done(run) else "to evaluate" if study.is_trained(run) else "to do"
        if run.is_assumed:
            state = f"waits for stage {run.stage - 1}"
        parents = ", ".join(_shown_id(parent) for parent in run.parents) or run.model
        stage = [str(run.stage)] if stages else []
        table.add_row(*map(Text, (*stage, _shown_id(run), parents, *_words(*costs[run.id]), state)))
    # Piped or in a log, nothing may be cut off.
    wide = console if console.is_terminal else Console(file=console.file, width=200)
    wide.print(table, markup=False)
    left = [costs[run_id] for run_id in {run.id for run in plan.runs if not study.is_trained(run)}]
    tokens, seconds = (
        (None if None in values else sum(values) for values in zip(*left, strict=True)) if left else (0, 0)
    )
    ids = {run.id: run.method.name in own for run in plan.runs}  # a winner is one of the runs that were tried
    words = _words(tokens, seconds)
    wide.print(
        f"{len(ids)} runs: {sum(ids.values())} of yours, {len(ids) - sum(ids.values())} controls; training left: "
        f"{words[0]} tokens, {words[1]}{_about_time(plan.recipe.facts)}; evaluation comes on top."
        + _about_stages(plan),
        highlight=False,
        soft_wrap=True,
    )


def _shown_id(run: StudyRun) -> str:
    """Folder of a run and what is tried with it; no hash where its settings are still to be chosen."""
    name = f"{run.id.rpartition('-')[0]}-?" if run.is_assumed else run.id
    return f"{name} {settings_text(run.tried)}" if run.tried else name


def _about_stages(plan: Plan) -> str:
    if not plan.tunings:
        return ""
    counts = Counter({run.id: run.stage for run in reversed(plan.runs)}.values())
    stages = ", ".join(f"stage {stage}: {number}" for stage, number in sorted(counts.items()))
    waits = " Runs that wait are shown with the first settings of each list." * any(r.is_assumed for r in plan.runs)
    doubles = any(not tuned.is_settled and tuned.method.tune.double for tuned in plan.tunings)
    more = f" Each `double` may take up to {MAX_DOUBLINGS - 1} more for each of its seeds." if doubles else ""
    return (
        f"\nRuns by stage: {stages}; a stage starts when the held-out losses of the one before are known.{waits}{more}"
    )


def _about_time(facts: Facts) -> str:
    if facts.tokens_per_s:
        return f" at {facts.tokens_per_s:.3g} tokens/s of full fine-tuning"
    if facts.flops_per_s:
        return (
            f" at {facts.flops_per_s:.3g} FLOP/s, counted and not measured (--measure times {NUM_MEASURED_STEPS} steps)"
        )
    return f" (time is not known: --measure times {NUM_MEASURED_STEPS} steps, or give model_facts: {{tokens_per_s: N}})"


def _words(tokens: int | None, seconds: float | None) -> tuple[str, str]:
    return "?" if tokens is None else f"{tokens:.3g}", "?" if seconds is None else time_text(seconds)


def cost_of(plan: Plan, run: StudyRun) -> tuple[int | None, float | None]:
    """Tokens that a run trains on, padding not counted, and seconds of training; None where the recipe does not say."""
    if run.method.method in (PRETRAINED, *UNTRAINED_METHODS):
        return 0, 0.0
    tokens = _tokens(plan, run)
    return tokens, None if tokens is None else _seconds(run, plan.recipe.facts, tokens)


def _tokens(plan: Plan, run: StudyRun) -> int | None:
    data, options = plan.recipe.data[run.method.data or next(iter(plan.recipe.data))], run.options
    if data.tokens_per_row is None:
        return None
    per_row = min(data.tokens_per_row, options.get("max_length") or math.inf)
    if int(options.get("max_steps", -1)) > 0:
        return round(options["max_steps"] * _batch(plan, options) * per_row)
    held_out = 0 if options.get("eval_dataset_name") else options.get("eval_split_size", 0.1)
    dataset, most = str(options.get("dataset_name", "")), options.get("max_train_samples")
    rows = num_train_rows(dataset, most, held_out, data.num_rows)
    return None if rows is None else round(rows * per_row * options.get("num_train_epochs", 3))


def _batch(plan: Plan, options: dict) -> int:
    per_process = options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
    return options.get("global_batch_size") or per_process * (plan.recipe.launch.num_processes or 1)


def _seconds(run: StudyRun, facts: Facts, tokens: int) -> float | None:
    """Time of ``tokens``, where the recipe says how fast full fine-tuning is or how fast the machine multiplies."""
    if facts.num_layers is None:  # then every method is taken to be as slow as full fine-tuning
        return tokens / facts.tokens_per_s if facts.tokens_per_s else None
    layers = run.options.get("mask_layers_to_transform") or run.options.get("partial_layers")
    passes = passes_of(run.method.method, run.options, facts.num_layers, layers)
    if facts.tokens_per_s:
        return tokens / facts.tokens_per_s * passes / passes_of("full", run.options, facts.num_layers, None)
    if facts.flops_per_s and facts.num_parameters:
        return tokens * passes * 2 * facts.num_parameters / facts.num_layers / facts.flops_per_s
    return None


def passes_of(method: str, options: dict, num_layers: int, layers: list[int] | None) -> float:
    """Cost of a token in passes over one layer.

    Args:
        method: Method of ``maskft train``.
        options: Its options, for gradient checkpointing.
        num_layers: Decoder layers of the model.
        layers: Layers that are trained; None for all.
    """
    is_checkpointed = options.get("activation_checkpointing", options.get("gradient_checkpointing", True))
    return layer_passes(num_layers, layers or range(num_layers), method == PEFT, is_checkpointed)["total"]


# What is at hand here


def with_local_facts(plan: Plan) -> Plan:
    """The plan with what its recipe does not say, where model and data are at hand: layers, rows, tokens per row."""
    recipe, model = plan.recipe, plan.recipe.models[0]
    if not (Path(model).is_dir() or model == EMBEDDED_MODEL):
        return plan
    facts, data = recipe.facts, dict(recipe.data)
    if facts.num_layers is None:
        config = load_config(model).get_text_config()
        facts = facts.model_copy(update={"num_layers": config.num_hidden_layers})
    for name, part in data.items():
        run = next((run for run in plan.runs if (run.method.data or next(iter(data))) == name and run.options), None)
        if part.tokens_per_row is None and run is not None:
            data[name] = _read(part, run, model)
    return replace(plan, recipe=recipe.model_copy(update={"facts": facts, "data": data}))


def _read(part: Data, run: StudyRun, model: str) -> Data:
    """Rows to train on, and their mean length, of data that are local files."""
    parsed = parsed_run(run)
    names = data_sets(parsed.data.dataset_name).values()
    if not names or not all(Path(name).is_file() for name in names):
        return part
    training = parsed.training
    tokenizer = load_tokenizer(model, training.chat_template_path)
    train = load_splits(parsed.data, parsed.data.split_seed, tokenizer, training.dataset_text_field).train
    first = train.select(range(min(_ROWS_READ, len(train))))
    tokens = tokenize_dataset(first, tokenizer, training.max_length, text_field=training.dataset_text_field)
    return part.model_copy(
        update={"num_rows": len(train), "tokens_per_row": sum(map(len, tokens["input_ids"])) / len(tokens)}
    )


def with_measured_speed(plan: Plan) -> Plan:
    """The plan with the speed of its first full fine-tuning, measured here on ten steps, in a folder that is dropped.

    Raises:
        UserError: If training fails.
    """
    run = next((run for run in plan.runs if run.method.method == "full" and run.start is None), None)
    if run is None:
        return plan
    short = {"max_steps": NUM_MEASURED_STEPS, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    with tempfile.TemporaryDirectory(prefix="maskft-") as place:
        given = {"method": "full", "model_name_or_path": run.model, "output_dir": f"{place}/run"}
        run_command([*PYTHON, "train", *command_words(run.options | given | short)], Path(place) / files.LOG)
        summary = files.read_json(Path(place) / "run" / files.TRAINING)["summary"]
    facts = plan.recipe.facts.model_copy(update={"tokens_per_s": summary["num_train_tokens"] / summary["train_time_s"]})
    return replace(plan, recipe=plan.recipe.model_copy(update={"facts": facts}))
