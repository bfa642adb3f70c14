"""A token of each answer in a batch under bfloat16 autocast: weights cast once, as ``maskft evaluate --bf16`` does, and
cast again in every forward pass, as autocast does by itself.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from maskft_common.errors import UserError
from maskft_lab.evaluation.cast_once import weights_cast_once
from maskft_lab.generation.row_cache import RowCache, attention

from .common import QWEN25_05B, SMOLLM2, TINY, alternate, build

PROMPT_TOKENS = 60


def run(report) -> None:
    """Add the rows."""
    if report.quick:
        shapes = {"tiny": TINY}
        sizes = [2]
    else:
        shapes = {
            "SmolLM2-135M": SMOLLM2,
            "Qwen2.5-0.5B": QWEN25_05B,
        }
        sizes = [1, 8, 64]

    for name, shape in shapes.items():
        model = build(shape, report.device).eval()
        generator = torch.Generator().manual_seed(0)
        for num_rows in sizes:
            ids = torch.randint(shape["vocab_size"], (num_rows, PROMPT_TOKENS), generator=generator)
            compare(report, name, model, ids.tolist())


def compare(report, name: str, model, rows: list[list[int]]) -> None:
    """Add the ratio of both sides for a batch."""
    bfloat16 = torch.autocast(report.device.type, torch.bfloat16)
    with torch.inference_mode(), bfloat16, attention(model):
        cache = RowCache(model, len(rows), [])
        cache.add(rows, 0)
        once = weights_cast_once(model)
        if isinstance(once, nullcontext):
            raise UserError(f"{name}: too little free memory for the cast weights, so there is nothing to compare")

        # Both read the last token of the prompts again and again, at the same place of the cache.
        def cast_once() -> None:
            with once:
                cache.step(rows)

        def cast_always() -> None:
            cache.step(rows)

        times_once, times_always = alternate([cast_once, cast_always], report.rounds, report.device)
    what = f"{name}, a token of {len(rows)} answers: cast once / always"
    report.add_ratio("cast_once", what, times_once, times_always, None, rounds=report.rounds)
