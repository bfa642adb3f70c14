"""Shared parts of the benchmarks: timing two sides in turn, the models that they run, and the report."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from maskft import MaskConfig, set_mask_progress
from maskft.training.arguments import multiplies_bfloat16
from maskft_common import files
from maskft_common.environment import environment
from maskft_common.errors import UserError

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
    "vocab_size": 256,  # small, because the decoder layers are measured and not the head
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
LLAMA2_7B = {
    **LLAMA2_7B_TWO_LAYERS,
    "vocab_size": 32000,
    "num_hidden_layers": 32,
}
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
QWEN25_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
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


def check_device(device: str) -> None:
    """Raise for a GPU that is not there.

    Raises:
        UserError: If torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device; leave out --device cuda")


class Report:
    """Collects rows; prints each as it comes, and writes all so far into ``file``.

    Args:
        device: ``cpu`` or ``cuda``.
        rounds: How often two sides alternate.
        quick: Tiny shapes and two rounds, which measure nothing.
        file: The JSON file.
        settings: More fields of its settings.
    """

    def __init__(self, device: str, rounds: int, quick: bool, file: Path, **settings):
        self.device = torch.device(device)
        self.rounds = 2 if quick else rounds
        self.quick = quick
        self.file = file
        self.folder = file.parent
        self.console = Console(width=140)
        self.rows: list[dict] = []
        self.settings = {
            "threads": torch.get_num_threads(),
            "rounds": self.rounds,
            "device": self.device_name(),
            # Of training steps; what else is measured says its own dtype.
            "weights_of_steps": str(torch.float32),
            "seed": 0,
            **settings,
        }
        is_autocast = autocast(self.device)._enabled
        self.settings["autocast_of_steps"] = str(torch.bfloat16) if is_autocast else None

    def device_name(self) -> str:
        """Name of the card, or cpu."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return "cpu"

    def add(
        self,
        benchmark: str,
        what: str,
        value: float | None,
        unit: str,
        target: str | None = None,
        **facts,
    ) -> None:
        """Add and print one number.

        Args:
            benchmark: Name of the benchmark.
            what: The quantity.
            value: The number; None if it could not be measured.
            unit: Its unit; ``x`` is a ratio.
            target: A bound such as ``<= 1.05``.
            facts: More fields of the row.
        """
        met = None
        # Times and ratios of tiny shapes mean nothing.
        is_meaningless = self.quick and unit in ("s", "x")
        if target is not None and value is not None and not is_meaningless:
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
        self.write()  # after each row, because a benchmark takes many minutes
        shown = "   failed" if value is None else f"{value:9.4g}"
        goal = "" if target is None else f"  (target {target})"
        verdict = ""
        if met is not None:
            verdict = "  met" if met else "  MISSED"
        extra = []
        for name, fact in facts.items():
            if isinstance(fact, float):
                extra.append(f"{name} {fact:.4g}")
            elif not isinstance(fact, list | dict):  # these are for the file alone
                extra.append(f"{name} {fact}")
        # `highlight` would colour the numbers.
        self.console.print(
            f"{benchmark:<8} {what:<58} {shown} {unit}{goal}{verdict}   {'  '.join(extra)}", highlight=False
        )

    def compare(
        self,
        benchmark: str,
        what: str,
        ours,
        other,
        target: str | None = None,
        rounds: int | None = None,
        warm_up: bool = True,
        **facts,
    ) -> None:
        """Time two functions in turn and add ours / other."""
        times_ours, times_other = alternate([ours, other], rounds or self.rounds, self.device, warm_up)
        self.add_ratio(benchmark, what, times_ours, times_other, target, **facts)

    def add_ratio(
        self,
        benchmark: str,
        what: str,
        first: list[float],
        second: list[float],
        target: str | None = None,
        **facts,
    ) -> None:
        """Add the ratio of the medians of two sides that were measured in turn, in seconds."""
        first_s = statistics.median(first)
        second_s = statistics.median(second)
        # The spread of these ratios says how much the result is worth on a busy machine.
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        self.add(
            benchmark,
            what,
            first_s / second_s,
            "x",
            target,
            first_s=first_s,
            second_s=second_s,
            ratio_of_each_round=ratios,
            **facts,
        )

    def write(self) -> None:
        """Write all rows so far, the machine and the versions."""
        record = {
            "settings": self.settings,
            "environment": environment(),
            "rows": self.rows,
        }
        files.write_text(self.file, json.dumps(record, indent=1) + "\n")


def seconds(function, device: torch.device) -> float:
    """Time of one call."""
    if device.type == "cuda":
        # A call on a GPU returns before its work is done, so the GPU's own events are timed.
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000  # from milliseconds
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(
    sides: list,
    rounds: int,
    device: torch.device,
    warm_up: bool = True,
) -> list[list[float]]:
    """Times of all sides, one after the other in every round, so that a slow minute of the machine slows all alike.

    Args:
        sides: Functions.
        rounds: How often each is called.
        device: Where they run.
        warm_up: Whether to call each once before, uncounted: the first call allocates memory.

    Returns:
        A list for each side, in the order of the rounds.
    """
    if warm_up:
        for side in sides:
            side()
    times = [[] for _ in sides]
    for _ in range(rounds):
        for side, of_side in zip(sides, times, strict=True):
            of_side.append(seconds(side, device))
    return times


# Models


def build(
    shape: dict,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, the same in every call on a device."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": shape["num_attention_heads"], **shape}
    config = LlamaConfig(**sizes, dtype=dtype)
    # Made on the device: a 7B model on the CPU first would take minutes, and memory that is measured.
    with device:
        return LlamaForCausalLM._from_config(config, dtype=dtype)


# A mask whose number of removed weights is free: each weight has a gate, and nothing is ranked.
DELETION = {
    "selection": "logit",
    "init_value": 0.04,
    "gradient": "sigmoid",
    "sharpness": 10.0,
    "sharpness_end": 100.0,
    "price": 1.0,
}
MASKS = {
    "mask": {},
    "deletion": DELETION,
    "gates": DELETION | {"target_modules": ["gate_proj"]},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def prepare(side: str, model: LlamaForCausalLM, layers: list[int]):
    """Make ``model`` ready to train.

    Args:
        side: ``mask`` (ours), ``deletion`` (ours, with gates instead of a ranking), ``gates`` (the same of the gate
            projections alone, as the preset ``deletion_tuning``), ``floor`` (plain training of the same matrices),
            ``published`` (a mask sorted in every forward), ``full``, ``lora``, ``frozen`` (nothing is trained).
        model: The model; it is changed.
        layers: Decoder layers to mask or train.
    """
    if side in MASKS:
        config = MaskConfig(layers_to_transform=layers, **MASKS[side])
        masked = get_peft_model(model, config)
        set_mask_progress(masked, 0.5)  # the sharpness of gates depends on it
        return masked
    if side == "lora":
        config = LoraConfig(
            r=16,
            target_modules=list(PROJECTIONS),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)

    # Plain models, of which some weights are trained.
    model.requires_grad_(side == "full")
    if side == "frozen":
        # Without trained parameters there would be no backward pass. An input that requires a gradient makes gradients
        # flow through the same layers, and takes next to no memory.
        model.model.layers[layers[0]].register_forward_pre_hook(_require_grad)

    for index in layers:
        layer = model.model.layers[index]
        for name, module in list(layer.named_modules()):  # a list, because modules are replaced
            parent, _, leaf = name.rpartition(".")
            if leaf not in PROJECTIONS:
                continue
            if side == "floor":
                module.weight.requires_grad_(True)
            elif side == "published":
                sorting = SortingMaskedLinear(module, sparsity=0.1)
                setattr(layer.get_submodule(parent), leaf, sorting)

    # Trained parameters are float32, as scores are.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _require_grad(module, args):
    hidden, *others = args
    return (hidden.detach().requires_grad_(True), *others)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where ``maskft train`` would use it."""
    is_enabled = device.type != "cpu" or multiplies_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_enabled)


class Step:
    """One optimizer step of a side: accumulated micro-batches, clipping, AdamW if anything is trained.

    Args:
        model: The model, see `prepare`.
        vocab_size: Tokens are random numbers below it.
        tokens: Tokens of a micro-batch, in one row.
        accumulation: Micro-batches of a step.
        device: Where the model is.
        cast: Autocast; default: as ``maskft train`` would.
    """

    def __init__(
        self,
        model,
        vocab_size: int,
        tokens: int,
        accumulation: int,
        device: torch.device,
        cast=None,
    ):
        self.model = model.train()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # torch raises for an optimizer without parameters.
        parameters = self.trained or [torch.zeros(1)]
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=1e-4,
            weight_decay=0.0,
            fused=True,
        )
        generator = torch.Generator().manual_seed(0)
        # Random tokens: speed and memory do not depend on them.
        self.batches = torch.randint(vocab_size, (accumulation, 1, tokens), generator=generator).to(device)
        self.autocast = cast or autocast(device)

    def __call__(self) -> None:
        """Run the step."""
        accumulation = len(self.batches)
        for ids in self.batches:
            with self.autocast:
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss = loss / accumulation
            loss.backward()
        self.update()

    def update(self) -> None:
        """Clip the gradients and take a step of AdamW."""
        if not self.trained:
            return  # of the side "frozen" only memory and the passes count
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
