"""What the benchmarks share: timing two sides in turn, the models they run, and the report."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from accelerate.state import GradientState
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig, set_mask_progress
from maskft.training.arguments import multiplies_bfloat16
from maskft_common import files
from maskft_common.environment import environment

from .as_published import SortingMaskedLinear

# Shapes of SmolLM2-135M (huggingface.co/HuggingFaceTB/SmolLM2-135M) and of LLaMA2-7B; weights are random.
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA2_7B_TWO_LAYERS = {
    "vocab_size": 256,  # the head and the embedding are not what is measured
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
HALF_7B_LAYER = {
    "vocab_size": 256,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
}
LLAMA2_7B = {**LLAMA2_7B_TWO_LAYERS, "vocab_size": 32000, "num_hidden_layers": 32}
LLAMA32_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
ONE_LAYER = {
    "vocab_size": 256,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def set_threads(count: int) -> None:
    """Fix the number of torch threads."""
    torch.set_num_threads(count)


class Report:
    """Collects rows; prints each as it comes, and writes all so far into ``file``."""

    def __init__(self, device: str, rounds: int, quick: bool, file: Path, **settings):
        self.device, self.rounds, self.quick = torch.device(device), 2 if quick else rounds, quick
        self.file, self.folder = file, file.parent
        self.console = Console(width=140)
        self.rows: list[dict] = []
        self.settings = {
            "threads": torch.get_num_threads(),
            "rounds": self.rounds,
            "device": self.device_name(),
            **settings,
        }
        self.settings["autocast"] = str(torch.bfloat16) if autocast(self.device)._enabled else None

    def device_name(self) -> str:
        """Name of the card, or cpu."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def add(self, benchmark: str, what: str, value: float | None, unit: str, target: str | None = None, **facts):
        """Add and print one number, None if it could not be measured; ``target`` is text such as ``<= 1.05``."""
        met = None
        if target is not None and value is not None and not (self.quick and unit in ("s", "x")):  # times, ratios
            sign, bound = target.split()
            met = value <= float(bound) if sign == "<=" else value >= float(bound)
        row = {
            "benchmark": benchmark,
            "what": what,
            "value": value,
            "unit": unit,
            "target": target,
            "met": met,
            **facts,
        }
        self.rows.append(row)
        self.write()
        verdict = "" if met is None else ("  met" if met else "  MISSED")
        goal = "" if target is None else f"  (target {target})"
        extra = "  ".join(f"{k} {_short(v)}" for k, v in facts.items() if not isinstance(v, list | dict))
        shown = "   failed" if value is None else f"{value:9.4g}"
        self.console.print(f"{benchmark:<8} {what:<58} {shown} {unit}{goal}{verdict}   {extra}", highlight=False)

    def compare(
        self, benchmark: str, what: str, ours, other, target: str | None = None, rounds=None, warm_up=True, **facts
    ) -> None:
        """Time two sides in turn and add ours / other."""
        a, b = alternate([ours, other], rounds or self.rounds, self.device, warm_up)
        self.add_ratio(benchmark, what, a, b, target, **facts)

    def add_ratio(self, benchmark: str, what: str, a: list[float], b: list[float], target=None, **facts) -> None:
        """Add the ratio of the medians of two sides measured in turn."""
        ratio = statistics.median(a) / statistics.median(b)
        self.add(benchmark, what, ratio, "x", target, **_sides(a, b), **facts)

    def write(self) -> None:
        """Write all rows so far, the machine and the versions."""
        record = {"settings": self.settings, "environment": environment(), "rows": self.rows}
        files.write_text(self.file, json.dumps(record, indent=1) + "\n")


def _sides(a: list[float], b: list[float]) -> dict:
    return {
        "first_s": statistics.median(a),
        "second_s": statistics.median(b),
        "ratio_of_each_round": [x / y for x, y in zip(a, b, strict=True)],
    }


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def seconds(function, device: torch.device) -> float:
    """Time of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(sides: list, rounds: int, device: torch.device, warm_up: bool = True) -> list[list[float]]:
    """Times of all sides, one after the other in every round, after one call of each that is not counted."""
    if warm_up:
        for side in sides:
            side()
    times = [[seconds(side, device) for side in sides] for _ in range(rounds)]
    return [list(column) for column in zip(*times, strict=True)]


# Models


def build(shape: dict, device: torch.device, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, the same in every call on a device."""
    torch.manual_seed(0)
    config = LlamaConfig(**{"num_key_value_heads": shape["num_attention_heads"], **shape}, dtype=dtype)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=dtype)


# A mask with a free budget: the gate of every weight opens by itself, nothing is ranked.
DELETION = {
    "selection": "logit",
    "init_value": 0.04,
    "gradient": "sigmoid",
    "sharpness": 10.0,
    "sharpness_end": 100.0,
    "price": 1.0,
}
MASKS = {"mask": {}, "deletion": DELETION, "gates": DELETION | {"target_modules": ["gate_proj"]}}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepare(side: str, model: LlamaForCausalLM, layers: list[int]):
    """Make ``model`` ready to train.

    Args:
        side: ``mask`` (ours), ``deletion`` (ours with a free budget), ``gates`` (the same of the gate projections
            alone, as the preset ``deletion_tuning``), ``floor`` (plain training of the same matrices),
            ``published`` (a mask sorted in every forward), ``full``, ``lora``, ``frozen`` (nothing is trained).
        model: The model; it is changed.
        layers: Decoder layers to mask or train.
    """
    if side in MASKS:
        masked = get_peft_model(model, MaskConfig(layers_to_transform=layers, **MASKS[side]))
        set_mask_progress(masked, 0.5)
        return masked
    if side == "lora":
        return get_peft_model(
            model, LoraConfig(r=16, target_modules=list(PROJECTIONS), layers_to_transform=layers, task_type="CAUSAL_LM")
        )
    model.requires_grad_(side == "full")
    if side == "frozen":
        # Gradients flow through the same layers, to an input that is nothing beside them.
        model.model.layers[layers[0]].register_forward_pre_hook(_require_grad)
    for layer in layers:
        for name, module in list(model.model.layers[layer].named_modules()):
            if name.rpartition(".")[2] in PROJECTIONS:
                if side == "floor":
                    module.weight.requires_grad_(True)
                elif side == "published":
                    parent = model.model.layers[layer].get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], SortingMaskedLinear(module, sparsity=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:  # what is trained is float32, as scores are
            parameter.data = parameter.data.float()
    return model


def _require_grad(module, args):
    hidden = args[0].detach().requires_grad_(True)
    return (hidden, *args[1:])


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where ``maskft train`` would use it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or multiplies_bfloat16())


class Step:
    """One optimizer step of a side: accumulated micro-batches, clipping, AdamW where anything is trained."""

    def __init__(self, model, vocab_size: int, tokens: int, accumulation: int, device: torch.device, cast=None):
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained or [torch.zeros(1)], lr=1e-4, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(vocab_size, (accumulation, 1, tokens), generator=generator).to(device)
        self.autocast = cast or autocast(device)

    def __call__(self) -> None:
        """Run the step."""
        state = GradientState()
        for index, ids in enumerate(self.batches):
            # What accelerate tells every model during accumulation.
            state._set_sync_gradients(index == len(self.batches) - 1)
            with self.autocast:
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(self.batches)).backward()
        if not self.trained:
            return
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
