"""One optimizer step: ours against the floor, full fine-tuning and LoRA."""

from __future__ import annotations

import gc

from .common import LLAMA2_7B_TWO_LAYERS, ONE_LAYER, SMOLLM2, TINY, Step, alternate, build, prepare


def units(num_layers: int, first: int, last: int) -> int:
    """Forward L, activation gradients L - a, weight gradients b - a + 1, in units of one layer's 2 N T."""
    return num_layers + (num_layers - first) + (last - first + 1)


def run(report) -> None:
    """Add the rows."""
    if report.quick:
        targets = {"floor": None, "full": None, "lora": None}
        compare_sides(report, "tiny", TINY, [1, 2], 8, 4, targets, report.rounds)
        return
    # First: what large models leave in memory changes the price of allocations.
    compare_sides(report, "one layer of width 1536", ONE_LAYER, [0], 128, 16, {"floor": "<= 1.05"}, 2 * report.rounds)
    small, name, layers = SMOLLM2, "SmolLM2-135M layers 20-23", list(range(20, 24))
    counted = units(30, 20, 23) / (3 * 30)
    targets = {"floor": "<= 1.05", "full": f"<= {counted * 1.1:.3f}", "lora": None}
    compare_sides(report, name, small, layers, 128, 16, targets, report.rounds)
    compare_sides(report, name, small, layers, 128, 1, {"floor": "<= 1.25", "full": None}, 2 * report.rounds)
    big, name = LLAMA2_7B_TWO_LAYERS, "7B-shaped layer"
    compare_sides(report, name, big, [1], 128, 1, {"floor": "<= 1.25", "full": None}, report.rounds)
    compare_sides(report, name, big, [1], 128, 16, {"floor": "<= 1.05"}, 2)


def compare_sides(report, name, shape, layers, tokens, accumulation, targets, rounds, warm_up=True) -> None:
    """Time a step of ours and of all sides in ``targets`` in turn."""

    def step(side):
        model = prepare(side, build(shape, report.device), layers)
        return Step(model, shape["vocab_size"], tokens, accumulation, report.device)

    ours, *others = alternate([step(side) for side in ("mask", *targets)], rounds, report.device, warm_up)
    facts = {"tokens": tokens, "accumulation": accumulation, "rounds": rounds}
    for (other, target), times in zip(targets.items(), others, strict=True):
        if other == "published":
            report.add_ratio("published", f"{name}: sorted in every forward / mask", times, ours, target, **facts)
        else:
            report.add_ratio("step", f"{name}: mask / {other}", ours, times, target, **facts)
    gc.collect()
