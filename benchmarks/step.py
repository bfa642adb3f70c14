"""One optimizer step: ours against the floor, full fine-tuning and LoRA."""

from __future__ import annotations

import gc

from .common import LLAMA2_7B_TWO_LAYERS, ONE_LAYER, SMOLLM2, TINY, Step, alternate, build, prepare


def units(num_layers: int, first: int, last: int) -> int:
    """Work of a step that trains the layers from ``first`` to ``last``, in units of one layer's forward pass.

    The forward pass takes all layers, the gradients of activations those from the last layer down to ``first``, and the
    gradients of weights the trained ones.
    """
    forward = num_layers
    activation_gradients = num_layers - first
    weight_gradients = last - first + 1
    return forward + activation_gradients + weight_gradients


def run(report) -> None:
    """Add the rows."""
    if report.quick:
        compare_sides(
            report,
            name="tiny",
            shape=TINY,
            layers=[1, 2],
            tokens=8,
            accumulation=4,
            targets={"floor": None, "full": None, "lora": None},
            rounds=report.rounds,
        )
        return

    # First, because memory that large models leave behind changes the price of allocations.
    compare_sides(
        report,
        name="one layer of width 1536",
        shape=ONE_LAYER,
        layers=[0],
        tokens=128,
        accumulation=16,
        targets={"floor": "<= 1.05"},
        rounds=2 * report.rounds,
    )

    # Full fine-tuning takes three units for each of the 30 layers: forward pass and both gradients.
    share_of_full = units(30, 20, 23) / (3 * 30)
    compare_sides(
        report,
        name="SmolLM2-135M layers 20-23",
        shape=SMOLLM2,
        layers=list(range(20, 24)),
        tokens=128,
        accumulation=16,
        targets={"floor": "<= 1.05", "full": f"<= {share_of_full * 1.1:.3f}", "lora": None},
        rounds=report.rounds,
    )

    # With one micro-batch a step, which pays for a whole refresh.
    compare_sides(
        report,
        name="SmolLM2-135M layers 20-23",
        shape=SMOLLM2,
        layers=list(range(20, 24)),
        tokens=128,
        accumulation=1,
        targets={"floor": "<= 1.25", "full": None},
        rounds=2 * report.rounds,
    )
    compare_sides(
        report,
        name="7B-shaped layer",
        shape=LLAMA2_7B_TWO_LAYERS,
        layers=[1],
        tokens=128,
        accumulation=1,
        targets={"floor": "<= 1.25", "full": None},
        rounds=report.rounds,
    )

    # A step takes minutes here, so there are two rounds.
    compare_sides(
        report,
        name="7B-shaped layer",
        shape=LLAMA2_7B_TWO_LAYERS,
        layers=[1],
        tokens=128,
        accumulation=16,
        targets={"floor": "<= 1.05"},
        rounds=2,
    )


def compare_sides(
    report,
    name: str,
    shape: dict,
    layers: list[int],
    tokens: int,
    accumulation: int,
    targets: dict[str, str | None],
    rounds: int,
    warm_up: bool = True,
) -> None:
    """Time a step of ours and of all sides in ``targets`` in turn.

    Args:
        report: Gets the ratios.
        name: Of the model.
        shape: Of the model.
        layers: Decoder layers to mask or train.
        tokens: Tokens of a micro-batch.
        accumulation: Micro-batches of a step.
        targets: Side of `prepare` -> bound of the ratio.
        rounds: How often the sides alternate.
        warm_up: Whether a step of each goes before, uncounted.
    """
    steps = []
    for side in ("mask", *targets):
        model = prepare(side, build(shape, report.device), layers)
        steps.append(Step(model, shape["vocab_size"], tokens, accumulation, report.device))
    ours, *others = alternate(steps, rounds, report.device, warm_up)

    facts = {
        "tokens": tokens,
        "accumulation": accumulation,
        "rounds": rounds,
    }
    for (other, target), times in zip(targets.items(), others, strict=True):
        if other == "published":
            report.add_ratio("published", f"{name}: sorted in every forward / mask", times, ours, target, **facts)
        else:
            report.add_ratio("step", f"{name}: mask / {other}", ours, times, target, **facts)
    # Models with hooks are in reference cycles, which are not freed at once. The next comparison needs their memory.
    del steps, model
    gc.collect()
