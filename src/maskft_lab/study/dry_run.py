"""What a dry run says of each run before it runs: tokens, memory, time. Nothing is downloaded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskft.training.method_arguments import PEFT, UNTRAINED_METHODS
from maskft_base.runtime import time_text

from ..estimate.ledger import OPTIMIZER_BYTES, kept_bytes, layer_passes, num_train_rows
from .execute import Study
from .plan import Plan, StudyRun
from .recipe import PRETRAINED, Facts
from .tuning import MAX_DOUBLINGS, settings_text

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """What one run takes, estimated; None where the recipe and the files at hand do not say enough.

    Attributes:
        tokens: Tokens trained on, padding not counted.
        memory_bytes: Weights, gradients and optimizer of one process; activations come on top.
        seconds: Training time at the recipe's ``tokens_per_s`` or ``flops_per_s``; evaluation not counted.
    """

    tokens: int | None
    memory_bytes: int | None
    seconds: float | None


def print_dry_run(plan: Plan, folder: str | Path, console: Console | None = None) -> None:
    """Print what would run, from what, and what it takes; writes nothing."""
    console = console or Console()
    study = Study(Path(folder).absolute(), plan.recipe)
    plan = plan.again(study.heldout)
    is_tuned = bool(plan.tunings)
    table = Table(
        *(["stage"] if is_tuned else []), "run", "from", "tokens", "memory", "time", "state", title=plan.recipe.name
    )
    facts = {model: model_facts(plan.recipe.facts, model) for model in plan.recipe.models}
    estimates = {run.id: cost_of(plan, run, facts[run.model]) for run in plan.runs}
    for run in plan.runs:
        state = "finished" if study.is_done(run) else "to evaluate" if study.is_trained(run) else "to do"
        if run.is_assumed:
            state = f"waits for stage {run.stage - 1}"
        parents = ", ".join(_shown_id(parent) for parent in run.parents) or run.model
        stage = [str(run.stage)] if is_tuned else []
        table.add_row(*map(Text, (*stage, _shown_id(run), parents, *_words(estimates[run.id]), state)))
    # Piped or in a log, nothing may be cut off.
    width = console if console.is_terminal else Console(file=console.file, width=200)
    width.print(table, markup=False)
    ids = {run.id for run in plan.runs}  # a winner is one of the runs that were tried
    left = [estimates[run_id] for run_id in {run.id: run for run in plan.runs if not study.is_trained(run)}]
    tokens, seconds = (
        None if any(value is None for value in values) else sum(values)
        for values in ([e.tokens for e in left], [e.seconds for e in left])
    )
    total = _words(Cost(tokens, None, seconds))
    width.print(
        f"{len(ids)} runs; training left: {total[0]} tokens, {total[2]}. Memory is weights, gradients and "
        "optimizer of one process, without activations; evaluation comes on top of the time."
        + _about_time(plan.recipe.facts)
        + _about_stages(plan),
        highlight=False,
    )


def _shown_id(run: StudyRun) -> str:
    """Folder of a run and what is tried with it; no hash where its settings are still to be chosen."""
    if run.is_assumed:
        named = f"{run.id.rpartition('-')[0]}-?"
        return f"{named} {settings_text(run.tried)}" if run.tried else named
    return f"{run.id} {settings_text(run.tried)}" if run.tried else run.id


def _about_stages(plan: Plan) -> str:
    if not plan.tunings:
        return ""
    counts = Counter({run.id: run.stage for run in reversed(plan.runs)}.values())
    stages = ", ".join(f"stage {stage}: {number}" for stage, number in sorted(counts.items()))
    waits = " Costs of runs that wait are those of the first settings in each list." * any(
        run.is_assumed for run in plan.runs
    )
    doubles = any(not tuned.is_settled and tuned.method.tune.double for tuned in plan.tunings)
    more = f" Each `double` may take up to {MAX_DOUBLINGS - 1} more for each of its seeds." if doubles else ""
    return (
        f"\nRuns by stage: {stages}. A stage starts when the held-out losses of the one before are known.{waits}{more}"
    )


def _about_time(facts: Facts) -> str:
    if facts.tokens_per_s:
        return ""
    if facts.flops_per_s:
        return (
            "\nTime is counted, not measured: 2 FLOPs per parameter and pass, at the recipe's "
            f"{facts.flops_per_s:.3g} FLOP/s in all; model_facts: {{tokens_per_s: N}}, as maskft train prints it, "
            "is better."
        )
    return (
        "\nTime is not known: say in the recipe how fast your hardware trains (maskft train prints it), "
        "model_facts: {tokens_per_s: N}."
    )


def _words(e: Cost) -> tuple[str, str, str]:
    tokens = "?" if e.tokens is None else f"{e.tokens:.3g}"
    memory = "?" if e.memory_bytes is None else _in_units(e.memory_bytes, (("GB", 1e9, 1), ("MB", 1e6, 0)))
    time = "?" if e.seconds is None else time_text(e.seconds)
    return tokens, memory, time


def _in_units(value: float, units: tuple[tuple[str, float, int], ...]) -> str:
    """Return a value in the largest of the units of which it has one and a half, else in the smallest."""
    unit, size, digits = next((unit for unit in units if value >= 1.5 * unit[1]), units[-1])
    return f"{value / size:.{digits}f} {unit}"


def cost_of(plan: Plan, run: StudyRun, facts: Facts) -> Cost:
    """Estimate one run from its options, the data's size and facts about the model."""
    if run.method.method == PRETRAINED or run.method.method in UNTRAINED_METHODS:
        options = plan.recipe.evaluation if run.method.method == PRETRAINED else run.options
        return Cost(0, facts.num_parameters and facts.num_parameters * _dtype_bytes(options, facts), 0.0)
    tokens = _tokens(plan, run)
    seconds = None if tokens is None else _seconds(run, facts, tokens)
    memory, launch = _memory(run, facts), plan.recipe.launch
    if memory is not None and "fsdp" in (launch.accelerate_config or ""):
        memory = math.ceil(memory / (launch.num_processes or 1))  # every process holds its share
    return Cost(tokens, memory, seconds)


def model_facts(recipe_facts: Facts, model: str) -> Facts:
    """Facts of the recipe; what it does not say is counted on a meta device where the configuration is at hand."""
    known = recipe_facts.num_layers and recipe_facts.num_parameters and recipe_facts.weights_per_layer
    if known or not (Path(model) / "config.json").is_file():
        return recipe_facts
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    from maskft.tuner.targets import maskable_names

    num_layers = config.num_hidden_layers
    names = maskable_names(whole)
    weights = sum(m.weight.numel() for name, m in whole.named_modules() if name.rpartition(".")[2] in names)
    counted = {
        "num_layers": num_layers,
        "num_parameters": sum(p.numel() for p in whole.parameters()),
        "weights_per_layer": weights // num_layers,
    }
    return recipe_facts.model_copy(update=counted)


def _tokens(plan: Plan, run: StudyRun) -> int | None:
    data, options = plan.recipe.data[run.method.data or next(iter(plan.recipe.data))], run.options
    if data.tokens_per_row is None:
        return None
    per_row = min(data.tokens_per_row, options.get("max_length") or math.inf)
    if int(options.get("max_steps", -1)) > 0:
        return round(options["max_steps"] * _batch(plan, run) * per_row)
    held_out = 0 if options.get("eval_dataset_name") else options.get("eval_split_size", 0.1)
    dataset, most = str(options.get("dataset_name", "")), options.get("max_train_samples")
    rows = num_train_rows(dataset, most, held_out, data.num_rows)
    return None if rows is None else round(rows * per_row * options.get("num_train_epochs", 3))


def _batch(plan: Plan, run: StudyRun) -> int:
    options = run.options
    if options.get("global_batch_size"):
        return options["global_batch_size"]
    per_process = options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
    return per_process * (plan.recipe.launch.num_processes or 1)


def _seconds(run: StudyRun, facts: Facts, tokens: int) -> float | None:
    """Time of ``tokens``, where the recipe says how fast full fine-tuning is or how fast the machine multiplies."""
    layers = _trained_layers(run)
    if facts.num_layers is None:  # then every method is taken to be as slow as full fine-tuning
        return tokens / facts.tokens_per_s if facts.tokens_per_s else None
    passes = _passes(run.method.method, run.options, facts.num_layers, layers)
    if facts.tokens_per_s:
        return tokens / facts.tokens_per_s * passes / _passes("full", run.options, facts.num_layers, None)
    if facts.flops_per_s and facts.num_parameters:
        return tokens * passes * 2 * facts.num_parameters / facts.num_layers / facts.flops_per_s
    return None


def _passes(method: str, options: dict, num_layers: int, layers: list[int] | None) -> float:
    """Cost of a token in passes over one layer: the floor, less what is cached, and what is computed again.

    Args:
        method: Method of ``maskft train``.
        options: Its options, for gradient checkpointing and prefix cache.
        num_layers: Decoder layers of the model.
        layers: Layers that are trained; None for all.
    """
    floor = layer_passes(num_layers, layers or range(num_layers))
    passes: float = floor["total"]
    if method == PEFT:
        passes -= floor["weight_gradients"]  # those of its small matrices are next to nothing
    if layers and options.get("mask_prefix_cache"):
        num_epochs = max(options.get("num_train_epochs", 3), 1)
        passes -= min(layers) * (1 - 1 / num_epochs)  # the layers below once, then read
    if options.get("activation_checkpointing", options.get("gradient_checkpointing", True)):
        passes += floor["activation_gradients"]
    return passes


def _trained_layers(run: StudyRun) -> list[int] | None:
    return run.options.get("mask_layers_to_transform") or run.options.get("partial_layers")


def _memory(run: StudyRun, facts: Facts) -> int | None:
    """Weights, gradients and optimizer, and what a mask has besides; LoRA matrices are taken to be nothing."""
    if facts.num_parameters is None:
        return None
    size, method, layers = _dtype_bytes(run.options, facts), run.method.method, _trained_layers(run)
    num_trained: int | None = 0
    if method == "full" and not layers:
        num_trained = facts.num_parameters
    elif method != PEFT:
        num_layers = len(layers) if layers else facts.num_layers
        num_trained = facts.weights_per_layer and num_layers and facts.weights_per_layer * num_layers
    if num_trained is None:
        return None
    optim = str(run.options.get("optim"))
    optim = optim if optim in OPTIMIZER_BYTES else "adamw_torch"
    trained, scores = ({}, num_trained) if method == "mask" else ({size: num_trained}, 0)
    return sum(kept_bytes(facts.num_parameters * size, trained, scores, size, optim).values())


def _dtype_bytes(options: dict, facts: Facts) -> int:
    """Bytes of a parameter in memory; float32 where nothing is said."""
    return _DTYPE_BYTES.get(options.get("dtype", "float32"), facts.dtype_bytes)
