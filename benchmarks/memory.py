"""Peak memory of one step, each side in a process of its own: ours against its floor, full fine-tuning and LoRA.

The floor: the process and the activations of the same step without anything trained, measured, and 16 bytes for each
masked weight (score, gradient, two moments). Under autocast the effective weights are in the measured part: it makes a
bfloat16 copy of every weight whose layer the gradient passes, and the effective weight takes the place of that copy.
Without autocast they are 4 bytes more.
"""

from __future__ import annotations

import multiprocessing
import sys

import torch

from maskft_common.memory import peak_memory_bytes

from .common import SMOLLM2, TINY, Step, autocast, build, prepare
from .micro_batch import TOKENS_OF_INTENTS


def run(report) -> None:
    """Add the rows."""
    shape, layers, tokens = (TINY, [1, 2], 8) if report.quick else (SMOLLM2, list(range(20, 24)), 256)
    peaks = {side: _peak(side, shape, layers, tokens, report) for side in ("frozen", "mask", "floor", "full", "lora")}
    model = prepare("floor", build(shape, torch.device("cpu")), layers)
    masked = sum(p.numel() for p in model.parameters() if p.requires_grad)
    floor = peaks["frozen"] + (16 if autocast(report.device)._enabled else 20) * masked
    gigabytes = {side: round(peak / 1e9, 3) for side, peak in peaks.items()}
    name = "tiny" if report.quick else "SmolLM2-135M layers 20-23"
    report.add(
        "memory", f"{name}: mask / floor", peaks["mask"] / floor, "x", "<= 1.05", floor_formula=floor / 1e9, **gigabytes
    )
    report.add("memory", f"{name}: mask / plain training of the same layers", peaks["mask"] / peaks["floor"], "x")
    report.add("memory", f"{name}: mask / full fine-tuning", peaks["mask"] / peaks["full"], "x")
    report.add("memory", f"{name}: mask / LoRA r=16", peaks["mask"] / peaks["lora"], "x")

    shape, name = (TINY, "tiny") if report.quick else (SMOLLM2, "SmolLM2-135M")
    layers = list(range(shape["num_hidden_layers"]))
    peaks = {side: _peak(side, shape, layers, TOKENS_OF_INTENTS, report) for side in ("gates", "full", "lora")}
    mask = f"{name}: deletion mask of all gate projections"
    report.add("memory", f"{mask} / LoRA r 16 of all matrices", peaks["gates"] / peaks["lora"], "x")
    report.add("memory", f"{mask} / full fine-tuning", peaks["gates"] / peaks["full"], "x")


def _peak(side: str, shape: dict, layers: list[int], tokens: int, report) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (side, shape, layers, tokens, str(report.device), torch.get_num_threads()))


def _measure(side, shape, layers, tokens, device, threads) -> int:
    torch.set_num_threads(threads)
    device = torch.device(device)
    step = Step(prepare(side, build(shape, device), layers), shape["vocab_size"], tokens, 2, device)
    for _ in range(3):
        step()
    return peak_memory_bytes()


if __name__ == "__main__":
    sys.exit("run it by python -m benchmarks memory")
