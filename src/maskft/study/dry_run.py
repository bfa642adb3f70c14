"""What a dry run says of each run before it runs: tokens, memory, time. Nothing is downloaded."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..estimate.floor import layer_passes
from ..files import is_there
from ..training.method_arguments import FIXED_MASK_METHODS
from .plan import Plan, Run
from .recipe import PRETRAINED, Facts

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Estimate:
    """Estimates of one run; None where the recipe and the files at hand do not say enough.

    Attributes:
        tokens: Tokens trained on, padding not counted.
        memory_bytes: Weights, gradients and optimizer of one process; activations come on top.
        seconds: Training time at the recipe's ``tokens_per_s`` or ``flops_per_s``; evaluation not counted.
    """

    tokens: int | None
    memory_bytes: int | None
    seconds: float | None


def estimate(plan: Plan, run: Run, facts: Facts) -> Estimate:
    """Estimate one run from its options, the data's size and facts about the model."""
    if run.method.method == PRETRAINED or run.method.method in FIXED_MASK_METHODS:
        options = plan.recipe.evaluation if run.method.method == PRETRAINED else run.options
        return Estimate(0, facts.num_parameters and facts.num_parameters * _dtype_bytes(options, facts), 0.0)
    tokens = _tokens(plan, run)
    seconds = None if tokens is None else _seconds(run, facts, tokens)
    memory, launch = _memory(run, facts), plan.recipe.launch
    if memory is not None and "fsdp" in (launch.accelerate_config or ""):
        memory = math.ceil(memory / (launch.num_processes or 1))  # every process holds its share
    return Estimate(tokens, memory, seconds)


def model_facts(recipe_facts: Facts, model: str) -> Facts:
    """Facts of the recipe; what it does not say is counted on a meta device where the configuration is at hand."""
    known = recipe_facts.num_layers and recipe_facts.num_parameters and recipe_facts.weights_per_layer
    if known or not (Path(model) / "config.json").is_file():
        return recipe_facts
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    from ..tuner.targets import maskable_names

    num_layers = config.num_hidden_layers
    names = maskable_names(whole)
    weights = sum(m.weight.numel() for name, m in whole.named_modules() if name.rpartition(".")[2] in names)
    return replace(
        recipe_facts,
        num_layers=num_layers,
        num_parameters=sum(p.numel() for p in whole.parameters()),
        weights_per_layer=weights // num_layers,
    )


def _tokens(plan: Plan, run: Run) -> int | None:
    data = plan.recipe.data[run.method.data or next(iter(plan.recipe.data))]
    if data.tokens_per_row is None:
        return None
    per_row = min(data.tokens_per_row, run.options.get("max_length") or math.inf)
    if int(run.options.get("max_steps", -1)) > 0:
        return round(run.options["max_steps"] * _batch(plan, run) * per_row)
    rows = _num_rows(plan, run)
    return None if rows is None else round(rows * per_row * run.options.get("num_train_epochs", 3))


def _batch(plan: Plan, run: Run) -> int:
    options = run.options
    if options.get("global_batch_size"):
        return options["global_batch_size"]
    per_process = options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
    return per_process * (plan.recipe.launch.num_processes or 1)


def _num_rows(plan: Plan, run: Run) -> int | None:
    """Rows to train on: what the recipe says, else the lines of a local file, bounded by max_train_samples."""
    data = plan.recipe.data[run.method.data or next(iter(plan.recipe.data))]
    rows, file = data.num_rows, Path(str(run.options.get("dataset_name", ""))).expanduser()
    if rows is None and is_there(str(file)) and file.is_file() and ".jsonl" in file.name:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rb") as lines:
            rows = sum(1 for line in lines if line.strip())
        held_out = run.options.get("eval_split_size", 0.1)
        if not run.options.get("eval_dataset_name"):
            rows = max(0, rows - round(held_out if held_out >= 1 else held_out * rows))
    most = run.options.get("max_train_samples")
    return rows if most is None else most if rows is None else min(rows, most)


def _seconds(run: Run, facts: Facts, tokens: int) -> float | None:
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
    if method == "lora":
        passes -= floor["weight_gradients"]  # those of its small matrices are next to nothing
    if layers and options.get("mask_prefix_cache"):
        num_epochs = max(options.get("num_train_epochs", 3), 1)
        passes -= min(layers) * (1 - 1 / num_epochs)  # the layers below once, then read
    if options.get("activation_checkpointing", options.get("gradient_checkpointing", True)):
        passes += floor["activation_gradients"]
    return passes


def _trained_layers(run: Run) -> list[int] | None:
    return run.options.get("mask_layers_to_transform") or run.options.get("partial_layers")


def _memory(run: Run, facts: Facts) -> int | None:
    if facts.num_parameters is None:
        return None
    from ..estimate.planned_run import OPTIMIZER_BYTES

    size = _dtype_bytes(run.options, facts)
    optim = str(run.options.get("optim"))
    moments = OPTIMIZER_BYTES.get(optim, OPTIMIZER_BYTES["adamw_torch"])
    frozen = facts.num_parameters * size
    if run.method.method == "lora":
        return frozen
    layers = _trained_layers(run)
    if run.method.method == "full" and not layers:
        return math.ceil(facts.num_parameters * (2 * size + moments(size)))  # weight, gradient, moments
    if facts.weights_per_layer is None or not (layers or facts.num_layers):
        return None
    trained = facts.weights_per_layer * (len(layers) if layers else facts.num_layers)
    # Of a mask: the masked copy, float32 scores, their gradient and moments; of layers: gradient and moments.
    beside = size + 8 + moments(4) if run.method.method == "mask" else size + moments(size)
    return math.ceil(frozen + trained * beside)


def _dtype_bytes(options: dict, facts: Facts) -> int:
    """Bytes of a parameter in memory; float32 where nothing is said."""
    return _DTYPE_BYTES.get(options.get("dtype", "float32"), facts.dtype_bytes)
