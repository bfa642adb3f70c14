"""Batches whose rows use different adapters: masks beside PEFT's LoRA and the plain base; and many masks in memory."""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable
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
NUM_FILES = 4  # different masks of a side; more adapters load them again
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
    if report.quick:
        shape = TINY
        prompt_tokens = 4
        new_tokens = 3
        num_loaded = 10
    else:
        shape = SMOLLM2
        prompt_tokens = 24
        new_tokens = 8
        num_loaded = 100
    numbers = (16, 4, 1)  # adapters of a batch
    most = max(numbers)
    base = build(shape, report.device).eval()

    with tempfile.TemporaryDirectory() as folder:
        sides = {"base": same_weights(base)}
        for name, sparsity in MASKS.items():
            folders = mask_folders(folder, name)
            write_masks(same_weights(base), folders, sparsity)
            sides[name] = with_masks(same_weights(base), folders, most)
        for name, (rank, targets) in LORAS.items():
            sides[name] = with_loras(same_weights(base), rank, targets, most)
        compare(report, sides, numbers, prompt_tokens, new_tokens, shape["vocab_size"])

        # Many masks need the memory.
        del sides
        gc.collect()
        first = next(iter(MASKS))
        many(report, same_weights(base), mask_folders(folder, first), num_loaded, first)


def mask_folders(folder: str, name: str) -> list[Path]:
    """Folders of a few different masks, each of which is loaded under several names."""
    return [Path(folder) / f"{name}-{number}" for number in range(NUM_FILES)]


def same_weights(model):
    """Another model around the tensors of ``model``, so that all sides together take the memory of one base."""
    # On the meta device, where weights take no memory; `assign` puts the other model's tensors in their place.
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), strict=False, assign=True)
    other.tie_weights()
    # Buffers that are not saved, such as those of rotary embeddings, are not in the state dict.
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, buffer)
    return other.requires_grad_(False).eval()


def write_masks(model, folders: list[Path], sparsity: float) -> None:
    """Save random masks of all gate projections, each with the fingerprint that loading checks."""
    # The files are written here and not by save_pretrained, which would need scores.
    masked = get_peft_model(model, MaskConfig(target_modules=["gate_proj"], inference_mode=True))
    layers = adapter_layers(masked)
    fingerprint = base_fingerprint(layers.values())
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        coded = {}
        for name, layer in layers.items():
            removed = torch.rand(layer.weight.shape, generator=generator) < sparsity
            coded[name.removeprefix("base_model.model.")] = encode_mask(~removed)
        tensors = {f"base_model.model.{name}.mask_coded": code for name, code in coded.items()}
        folder.mkdir()
        save_file(tensors, folder / layout.ADAPTER_WEIGHTS)
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
    """The model with ``number`` masks, named by their numbers."""
    # As a server does: the first mask wraps the model, all others are loaded into it.
    masked = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for other in range(1, number):
        masked.load_adapter(folders[other % len(folders)], str(other))
    return masked.eval()


def with_loras(model, rank: int, targets, number: int) -> PeftModel:
    """The model with ``number`` random LoRAs, named by their numbers."""
    config = {
        "r": rank,
        "target_modules": targets,
        "init_lora_weights": False,  # else B is zero, and the adapter does nothing
        "task_type": "CAUSAL_LM",
    }
    adapted = get_peft_model(model, LoraConfig(**config), adapter_name="0")
    for other in range(1, number):
        adapted.add_adapter(str(other), LoraConfig(**config))
    return adapted.requires_grad_(False).eval()


def compare(
    report,
    sides: dict,
    numbers: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    vocabulary: int,
) -> None:
    """Time prefill and decoding of every side in turn, and add the ratios.

    Args:
        report: Gets the ratios.
        sides: Name -> model.
        numbers: Numbers of different adapters in a batch.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to decode.
        vocabulary: Size of the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (BATCH, prompt_tokens), generator=generator).to(report.device)
    for number in numbers:
        # The rows use the adapters in turn.
        names = [str(row % number) for row in range(BATCH)]
        times = {side: {"prefill": [], "decode": []} for side in sides}
        for round_ in range(report.rounds + 1):
            for side, model in sides.items():
                prefill_s, decode_s = prefill_and_decode(model, ids, None if side == "base" else names, new_tokens)
                # The first round is not counted: in it masks compute the places of removed weights, which are kept.
                if round_ > 0:
                    times[side]["prefill"].append(prefill_s)
                    times[side]["decode"].append(decode_s)

        facts = {
            "adapters": number,
            "batch": BATCH,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "dtype": str(sides["base"].dtype),  # without autocast
        }
        has_target = number == 16
        for phase in ("prefill", "decode"):
            of = {side: of_side[phase] for side, of_side in times.items()}
            for side in sides:
                if side == "base":
                    continue
                target = TARGETS["base"] if side in MASKS and has_target else None
                what = f"{phase}, {number} adapters: {side} / base"
                report.add_ratio(
                    "mixed",
                    what,
                    of[side],
                    of["base"],
                    target,
                    **facts,
                )
            for masks, lora in itertools.product(MASKS, LORAS):
                target = TARGETS.get(lora) if has_target else None
                what = f"{phase}, {number} adapters: {lora} / {masks}"
                report.add_ratio(
                    "mixed",
                    what,
                    of[lora],
                    of[masks],
                    target,
                    **facts,
                )


@torch.inference_mode()
def prefill_and_decode(
    model,
    ids: torch.Tensor,
    names: list[str] | None,
    new_tokens: int,
) -> tuple[float, float]:
    """Seconds of the prompt, and of all new tokens."""
    clock = _clock_of(ids.device)
    # As PEFT's generate() does: hooks that pass the adapter names to the layers, set once for all tokens.
    if names is None:
        context = nullcontext()
        inner = model
    else:
        context = model._enable_peft_forward_hooks(adapter_names=names)
        inner = model.base_model
    with context:
        started = clock()
        output = inner(input_ids=ids, use_cache=True, logits_to_keep=1)
        after_prompt = clock()
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = inner(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return after_prompt - started, clock() - after_prompt


def _clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU processor time, which other programs change least."""
    return time.process_time if device.type == "cpu" else _synchronised


def _synchronised() -> float:
    """Seconds, once the GPU has done all work until now."""
    torch.cuda.synchronize()
    return time.perf_counter()


def many(
    report,
    model,
    folders: list[Path],
    number: int,
    what: str,
) -> None:
    """Load ``number`` masks: seconds, and bytes of a mask in its file, in use, and in a batch."""
    clock = _clock_of(report.device)
    started = clock()
    masked = with_masks(model, folders, number)
    seconds = clock() - started
    report.add("mixed", f"{number} {what}: load one", seconds / number, "s")
    file_bytes = (folders[0] / layout.ADAPTER_WEIGHTS).stat().st_size
    report.add("mixed", f"{what}: file", file_bytes / 1e6, "MB")

    # A batch in which every row uses another mask.
    ids = torch.zeros(
        BATCH,
        1,
        dtype=torch.long,
        device=report.device,
    )
    names = [str(row % number) for row in range(BATCH)]
    num_used = min(BATCH, number)
    started = clock()
    with torch.inference_mode():
        masked(input_ids=ids, adapter_names=names)
    seconds = clock() - started
    report.add("mixed", f"{what}: first use of {num_used}", seconds, "s")

    # Layers keep the places of the removed weights of each mask in use, and the products of the last batch.
    place_bytes = 0
    kept_bytes = 0
    for module in masked.modules():
        if not isinstance(module, MaskedLinear):
            continue
        kept_bytes += module.mixed_batch.num_bytes
        for *_, places in module.mixed_batch.places.values():
            place_bytes += sum(tensor.numel() * tensor.element_size() for tensor in places)
    report.add("mixed", f"{what}: places of one in use", place_bytes / num_used / 1e6, "MB")
    product_bytes = kept_bytes - place_bytes
    report.add("mixed", f"{what}: products of one row of a batch", product_bytes / BATCH / 1e6, "MB")
