"""One optimizer step of one micro-batch, where nothing shares the price of a refresh: masks and deletion masks.

And a deletion mask of all gate projections beside LoRA of rank 16 of all matrices, as in recipes/smollm2/study_curve_*.
"""

from __future__ import annotations

from .common import HALF_7B_LAYER, SMOLLM2, TINY, Step, alternate, build, prepare

TOKENS = 128
TOKENS_OF_INTENTS = 352  # 16 rows of 22


def run(report) -> None:
    """Add the rows."""
    shapes = [
        ("SmolLM2-135M layers 20-23", SMOLLM2, list(range(20, 24))),
        ("layer of half 7B's width", HALF_7B_LAYER, [0]),
    ]
    for name, shape, layers in [("tiny", TINY, [1, 2])] if report.quick else shapes:
        sides = [prepare(side, build(shape, report.device), layers) for side in ("floor", "mask", "deletion")]
        steps = [Step(model, shape["vocab_size"], TOKENS, 1, report.device) for model in sides]
        floor, *ours = alternate(steps, report.rounds, report.device)
        for side, times in zip(("mask", "deletion mask"), ours, strict=True):
            report.add_ratio("micro_batch", f"{name}: {side} / floor", times, floor, "<= 1.10", rounds=report.rounds)
    name, shape = ("tiny", TINY) if report.quick else ("SmolLM2-135M", SMOLLM2)
    layers = list(range(shape["num_hidden_layers"]))
    sides = [prepare(side, build(shape, report.device), layers) for side in ("gates", "lora", "full")]
    steps = [Step(model, shape["vocab_size"], TOKENS_OF_INTENTS, 1, report.device) for model in sides]
    gates, lora, full = alternate(steps, report.rounds, report.device)
    mask = f"{name}: deletion mask of all gate projections"
    report.add_ratio("micro_batch", f"{mask} / LoRA r 16 of all matrices", gates, lora, None, rounds=report.rounds)
    report.add_ratio("micro_batch", f"{mask} / full fine-tuning", gates, full, None, rounds=report.rounds)
