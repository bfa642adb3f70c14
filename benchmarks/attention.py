"""A training step with transformers' default attention (torch's fused one) and with ``--attn_implementation eager``.

On CPUs the backward pass of the fused one in bfloat16 is slow for short rows.
"""

from __future__ import annotations

from .common import SMOLLM2, TINY, Step, alternate, build, prepare


def run(report) -> None:
    """Add the rows."""
    # Rows of a batch, and tokens of each.
    if report.quick:
        name = "tiny"
        shape = TINY
        sizes = [(2, 8)]
    else:
        name = "SmolLM2-135M"
        shape = SMOLLM2
        sizes = [(16, 22), (16, 60), (2, 512)]
    layers = list(range(shape["num_hidden_layers"]))

    for rows, tokens in sizes:
        steps = []
        for implementation in ("eager", "sdpa"):
            model = build(shape, report.device)
            model.set_attn_implementation(implementation)
            model = prepare("gates", model, layers)
            step = Step(model, shape["vocab_size"], rows * tokens, 1, report.device)
            # A step has micro-batches of one long row. Attention depends on the length of rows, so it is cut.
            step.batches = step.batches.reshape(1, rows, tokens)
            steps.append(step)
        eager, fused = alternate(steps, report.rounds, report.device)
        what = f"{name}, deletion mask, {rows} rows of {tokens}: eager / sdpa"
        report.add_ratio("attention", what, eager, fused, None, rounds=report.rounds)
