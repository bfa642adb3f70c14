"""Peak memory of one step, each side in its own process: ours against its floor, full fine-tuning and LoRA.

The floor is the measured memory of the same step without anything trained (process and activations), plus 16 bytes for
each masked weight (score, gradient, two moments). Under autocast the measured part contains the effective weights:
autocast makes a bfloat16 copy of every weight whose layer the gradient passes, and the effective weight takes the place
of that copy. Without autocast they take 4 bytes more.
"""

from __future__ import annotations

import multiprocessing
import sys

import torch

from maskft_common.memory import peak_memory_bytes

from .common import SMOLLM2, TINY, Step, autocast, build, prepare
from .micro_batch import TOKENS_OF_INTENTS

ACCUMULATION = 2  # micro-batches of a step


def run(report) -> None:
    """Add the rows."""
    # Four layers, and plain training of the same ones.
    if report.quick:
        name = "tiny"
        shape = TINY
        layers = [1, 2]
        tokens = 8
    else:
        name = "SmolLM2-135M layers 20-23"
        shape = SMOLLM2
        layers = list(range(20, 24))
        tokens = 256
    peaks = {}
    for side in ("frozen", "mask", "floor", "full", "lora"):
        peaks[side] = _peak(side, shape, layers, tokens, report)

    model = prepare("floor", build(shape, torch.device("cpu")), layers)
    num_masked = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_autocast = autocast(report.device)._enabled
    bytes_per_weight = 16 if is_autocast else 20
    floor = peaks["frozen"] + bytes_per_weight * num_masked
    gigabytes = {side: round(peak / 1e9, 3) for side, peak in peaks.items()}
    facts = {"tokens": tokens, "accumulation": ACCUMULATION}
    report.add(
        "memory",
        f"{name}: mask / floor",
        peaks["mask"] / floor,
        "x",
        "<= 1.05",
        floor_formula=floor / 1e9,
        **gigabytes,
        **facts,
    )
    others = {"floor": "plain training of the same layers", "full": "full fine-tuning", "lora": "LoRA r=16"}
    for side, label in others.items():
        report.add("memory", f"{name}: mask / {label}", peaks["mask"] / peaks[side], "x", **facts)

    # A deletion mask of all gate projections, and LoRA of all matrices.
    name = "tiny" if report.quick else "SmolLM2-135M"
    layers = list(range(shape["num_hidden_layers"]))
    peaks = {}
    for side in ("gates", "full", "lora"):
        peaks[side] = _peak(side, shape, layers, TOKENS_OF_INTENTS, report)
    mask = f"{name}: deletion mask of all gate projections"
    facts = {"tokens": TOKENS_OF_INTENTS, "accumulation": ACCUMULATION}
    report.add("memory", f"{mask} / LoRA r 16 of all matrices", peaks["gates"] / peaks["lora"], "x", **facts)
    report.add("memory", f"{mask} / full fine-tuning", peaks["gates"] / peaks["full"], "x", **facts)


def _peak(
    side: str,
    shape: dict,
    layers: list[int],
    tokens: int,
    report,
) -> int:
    """Peak bytes of a side. In a new process, because the peak of a process never falls."""
    context = multiprocessing.get_context("spawn")
    arguments = (side, shape, layers, tokens, str(report.device), torch.get_num_threads())
    with context.Pool(1) as pool:
        return pool.apply(_measure, arguments)


def _measure(side, shape, layers, tokens, device, threads) -> int:
    torch.set_num_threads(threads)
    device = torch.device(device)
    model = prepare(side, build(shape, device), layers)
    step = Step(model, shape["vocab_size"], tokens, ACCUMULATION, device)
    # The first step allocates the optimizer's state, the next ones have it from their beginning.
    for _ in range(3):
        step()
    # Named: on a machine with a GPU the default would be the GPU, also of a step on the CPU.
    return peak_memory_bytes(device.type)


if __name__ == "__main__":
    sys.exit("run it by python -m benchmarks memory")
