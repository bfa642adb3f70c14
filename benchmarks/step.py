"""One optimizer step: ours against the floor, the published form, full fine-tuning and LoRA."""

from __future__ import annotations

import gc

from .common import LLAMA2_7B_TWO_LAYERS, SMOLLM2, TINY, Step, build, prepare


def units(num_layers: int, first: int, last: int) -> int:
    """Forward L, activation gradients L - a, weight gradients b - a + 1, in units of one layer's 2 N T."""
    return num_layers + (num_layers - first) + (last - first + 1)


def run(report) -> None:
    """Add the rows."""
    if report.quick:
        _pairs(report, "tiny", TINY, [1, 2], 8, 4, {"floor": None, "published": None, "full": None, "lora": None})
        return
    layers = list(range(20, 24))
    counted = units(30, 20, 23) / (3 * 30)
    _pairs(report, "SmolLM2-135M layers 20-23", SMOLLM2, layers, 128, 16, {"floor": "<= 1.05", "lora": None})
    _pairs(report, "SmolLM2-135M layers 20-23", SMOLLM2, layers, 128, 16, {"full": f"<= {counted * 1.1:.3f}"})
    _pairs(report, "SmolLM2-135M layers 20-23", SMOLLM2, layers, 128, 1, {"floor": "<= 1.25"})
    big, name = LLAMA2_7B_TWO_LAYERS, "7B-shaped layer"
    _pairs(report, name, big, [1], 128, 16, {"floor": "<= 1.05", "full": None, "lora": None})
    _pairs(report, name, big, [1], 128, 1, {"floor": "<= 1.25"})
    # Minutes for each step of the published form: one round, no warm-up.
    _pairs(report, name, big, [1], 128, 16, {"published": ">= 8"}, rounds=1)
    _pairs(report, name, big, [1], 2048, 4, {"published": ">= 1.7"}, rounds=1)


def _pairs(report, name, shape, layers, tokens, accumulation, targets, rounds=None) -> None:
    base = build(shape, report.device)

    def step(side):
        return Step(prepare(side, base, layers), shape["vocab_size"], tokens, accumulation, report.device)

    ours = step("mask")
    kept = report.rounds
    report.rounds = rounds or kept
    for other, target in targets.items():
        side = step(other)
        facts = {"tokens": tokens, "accumulation": accumulation}
        if other == "published":
            report.compare("step", f"{name}: sorted in every forward / mask", side, ours, target, **facts)
        else:
            report.compare("step", f"{name}: mask / {other}", ours, side, target, **facts)
        del side
        gc.collect()
    report.rounds = kept
