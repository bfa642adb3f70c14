"""One optimizer step against the published form, which sorts the scores in every forward pass."""

from __future__ import annotations

from .common import LLAMA2_7B_TWO_LAYERS, ONE_LAYER, TINY
from .step import compare_sides


def run(report) -> None:
    """Add the rows.

    The targets are for 16 micro-batches; on the large shape fewer are timed. Our side pays for a refresh once for all
    of them, the published form for a sort in each, so fewer can only make our side look worse.
    """
    if report.quick:
        compare_sides(
            report,
            "tiny",
            TINY,
            [1, 2],
            8,
            4,
            {"published": None},
            report.rounds,
            warm_up=False,
        )
        return
    name = "one layer of width 1536"
    compare_sides(
        report,
        name,
        ONE_LAYER,
        [0],
        128,
        16,
        {"published": ">= 11"},
        2,
        warm_up=False,
    )

    # A step of the published form takes minutes here, so there is one round, without a warm-up.
    name = "7B-shaped layer"
    compare_sides(
        report,
        name,
        LLAMA2_7B_TWO_LAYERS,
        [1],
        128,
        4,
        {"published": ">= 8"},
        1,
        warm_up=False,
    )
    compare_sides(
        report,
        name,
        LLAMA2_7B_TWO_LAYERS,
        [1],
        2048,
        1,
        {"published": ">= 1.7"},
        1,
        warm_up=False,
    )
