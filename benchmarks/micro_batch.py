"""One optimizer step of one micro-batch, which alone pays for the refresh of a mask: masks and deletion masks.

Also a deletion mask of all gate projections beside LoRA of rank 16 of all matrices, as in
recipes/smollm2/study_curve_*.
"""

from __future__ import annotations

from .common import HALF_7B_LAYER, SMOLLM2, TINY, Step, alternate, build, prepare

TOKENS = 128
TOKENS_OF_INTENTS = 352  # 16 rows of 22


def run(report) -> None:
    """Add the rows."""
    # A few layers: the masks of all matrices, and plain training of the same ones.
    models = [
        ("SmolLM2-135M layers 20-23", SMOLLM2, list(range(20, 24))),
        ("layer of half 7B's width", HALF_7B_LAYER, [0]),
    ]
    if report.quick:
        models = [("tiny", TINY, [1, 2])]
    for name, shape, layers in models:
        steps = steps_of(("floor", "mask", "deletion"), shape, layers, TOKENS, report)
        floor, mask, deletion = alternate(steps, report.rounds, report.device)
        for side, times in (("mask", mask), ("deletion mask", deletion)):
            report.add_ratio(
                "micro_batch",
                f"{name}: {side} / floor",
                times,
                floor,
                "<= 1.10",
                tokens=TOKENS,
                rounds=report.rounds,
            )

    # All layers, with batches of the size that the studies of intents have.
    name = "tiny" if report.quick else "SmolLM2-135M"
    shape = TINY if report.quick else SMOLLM2
    layers = list(range(shape["num_hidden_layers"]))
    steps = steps_of(("gates", "lora", "full"), shape, layers, TOKENS_OF_INTENTS, report)
    gates, lora, full = alternate(steps, report.rounds, report.device)
    for side, times in (("LoRA r 16 of all matrices", lora), ("full fine-tuning", full)):
        report.add_ratio(
            "micro_batch",
            f"{name}: deletion mask of all gate projections / {side}",
            gates,
            times,
            tokens=TOKENS_OF_INTENTS,
            rounds=report.rounds,
        )


def steps_of(
    sides: tuple[str, ...],
    shape: dict,
    layers: list[int],
    tokens: int,
    report,
) -> list[Step]:
    """A step of each side, with one micro-batch."""
    steps = []
    for side in sides:
        model = prepare(side, build(shape, report.device), layers)
        steps.append(Step(model, shape["vocab_size"], tokens, 1, report.device))
    return steps
