"""Batches whose rows use different adapters: masks beside PEFT's LoRA and the plain base; and many masks in memory."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from maskft import MaskConfig
from maskft.masks.codec import encode_mask
from maskft.masks.fingerprints import base_fingerprint, mask_fingerprint
from maskft.tuner import MaskedLinear, adapter_layers
from maskft_common import layout

from .common import SMOLLM2, TINY, build

BATCH = 16
NUM_FILES = 4
# The ready mask of sums removes 0.96 % of the gate weights, that of intents 4.1 %.
MASKS = {"masks 1 % of gates": 0.01, "masks 4 % of gates": 0.04}
LORAS = {
    "LoRA r 8, all linear": (8, "all-linear"),
    "LoRA r 16, all linear": (16, "all-linear"),
    "LoRA r 16, gates": (16, ["gate_proj"]),
}
TARGETS = {"base": "<= 1.2", "LoRA r 16, all linear": ">= 1.5"}


def run(report) -> None:
    """Add the rows."""
    shape = TINY if report.quick else SMOLLM2
    prompt_tokens, new_tokens = (4, 3) if report.quick else (24, 8)
    numbers = (16, 4, 1)
    base = build(shape, report.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        sides = {"base": same_weights(base, shape, report.device)}
        for name, sparsity in MASKS.items():
            folders = mask_folders(folder, name)
            write_masks(same_weights(base, shape, report.device), folders, sparsity)
            sides[name] = with_masks(same_weights(base, shape, report.device), folders, max(numbers))
        for name, (rank, targets) in LORAS.items():
            sides[name] = with_loras(same_weights(base, shape, report.device), rank, targets, max(numbers))
        compare(report, sides, numbers, prompt_tokens, new_tokens, shape["vocab_size"])
        del sides
        gc.collect()
        first = next(iter(MASKS))
        base = same_weights(base, shape, report.device)
        many(report, base, mask_folders(folder, first), 10 if report.quick else 100, first)


def mask_folders(folder: str, name: str) -> list[Path]:
    """Folders of a few different masks, each of which is loaded under several names."""
    return [Path(folder) / f"{name}-{number}" for number in range(NUM_FILES)]


def same_weights(model, shape: dict, device: torch.device):
    """Another model around the tensors of ``model``, so that seven sides take the memory of one base."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), strict=False, assign=True)
    other.tie_weights()
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, buffer)
    return other.requires_grad_(False).eval()


def write_masks(model, folders: list[Path], sparsity: float) -> None:
    """Save random masks of all gate projections, each with the fingerprint that loading checks."""
    masked = get_peft_model(model, MaskConfig(target_modules=["gate_proj"], inference_mode=True))
    layers = adapter_layers(masked)
    fingerprint = base_fingerprint(layers.values())
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        coded = {}
        for name, layer in layers.items():
            removed = torch.rand(layer.weight.shape, generator=generator) < sparsity
            coded[name.removeprefix("base_model.model.")] = encode_mask(~removed)
        folder.mkdir()
        save_file(
            {f"base_model.model.{name}.mask_coded": code for name, code in coded.items()},
            folder / layout.ADAPTER_WEIGHTS,
        )
        config = {
            "peft_type": "MASK",
            "target_modules": ["gate_proj"],
            "selection": "logit",
            "inference_mode": True,
            "format_version": 2,
            "mask_sha256": mask_fingerprint(coded),
            "base_fingerprint": fingerprint,
        }
        (folder / layout.ADAPTER_CONFIG).write_text(json.dumps(config))


def with_masks(model, folders: list[Path], number: int) -> PeftModel:
    """The model with so many adapters, named by their numbers."""
    masked = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for other in range(1, number):
        masked.load_adapter(folders[other % len(folders)], str(other))
    return masked.eval()


def with_loras(model, rank: int, targets, number: int) -> PeftModel:
    """The model with random LoRA adapters, named by their numbers."""
    config = {"r": rank, "target_modules": targets, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**config), adapter_name="0")
    for other in range(1, number):
        adapted.add_adapter(str(other), LoraConfig(**config))
    return adapted.requires_grad_(False).eval()


def compare(
    report, sides: dict, numbers: tuple[int, ...], prompt_tokens: int, new_tokens: int, vocabulary: int
) -> None:
    """Time prefill and decoding of every side in turn; of the rounds, the median of processor time counts."""
    ids = torch.randint(vocabulary, (BATCH, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(
        report.device
    )
    for number in numbers:
        names = [str(row % number) for row in range(BATCH)]
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for round_ in range(report.rounds + 1):
            for side, model in sides.items():
                measured = prefill_and_decode(model, ids, None if side == "base" else names, new_tokens)
                if round_ > 0:  # the first call makes what is kept
                    times[side].append(measured)
        for part, phase in enumerate(("prefill", "decode")):
            of = {side: [each[part] for each in measured] for side, measured in times.items()}
            facts = {"adapters": number, "batch": BATCH, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
            for side in sides:
                if side != "base":
                    target = TARGETS["base"] if side in MASKS and number == 16 else None
                    report.add_ratio(
                        "mixed", f"{phase}, {number} adapters: {side} / base", of[side], of["base"], target, **facts
                    )
            for masks in MASKS:
                for lora in LORAS:
                    target = TARGETS.get(lora) if number == 16 else None
                    what = f"{phase}, {number} adapters: {lora} / {masks}"
                    report.add_ratio("mixed", what, of[lora], of[masks], target, **facts)


@torch.inference_mode()
def prefill_and_decode(model, ids: torch.Tensor, names: list[str] | None, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of all new tokens; processor time, which other programs change least."""
    clock = time.process_time if ids.device.type == "cpu" else _synchronised
    # As generate() does, once for all tokens.
    context = nullcontext() if names is None else model._enable_peft_forward_hooks(adapter_names=names)
    with context:
        inner = model if names is None else model.base_model
        started = clock()
        output = inner(input_ids=ids, use_cache=True, logits_to_keep=1)
        after_prompt = clock()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = inner(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return after_prompt - started, clock() - after_prompt


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def many(report, model, folders: list[Path], number: int, what: str) -> None:
    """Load a hundred masks: seconds, and bytes of a mask that is loaded, in use, and in a batch."""
    started = time.process_time()
    masked = with_masks(model, folders, number)
    report.add("mixed", f"{number} {what}: load one", (time.process_time() - started) / number, "s")
    file = (folders[0] / layout.ADAPTER_WEIGHTS).stat().st_size
    report.add("mixed", f"{what}: file", file / 1e6, "MB")
    layers = [module for module in masked.modules() if isinstance(module, MaskedLinear)]
    ids = torch.zeros(BATCH, 1, dtype=torch.long, device=report.device)
    started = time.process_time()
    with torch.inference_mode():
        masked(input_ids=ids, adapter_names=[str(each % number) for each in range(BATCH)])
    first_use = time.process_time() - started
    places = sum(
        each.numel() * each.element_size()
        for layer in layers
        for *_, p in layer.mixed_batch.places.values()
        for each in p
    )
    used = min(BATCH, number)
    report.add("mixed", f"{what}: first use of {used}", first_use, "s")
    report.add("mixed", f"{what}: places of one in use", places / used / 1e6, "MB")
    kept = sum(layer.mixed_batch.num_bytes for layer in layers) - places
    report.add("mixed", f"{what}: products of one row of a batch", kept / BATCH / 1e6, "MB")
