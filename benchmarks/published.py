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
            name="tiny",
            shape=TINY,
            layers=[1, 2],
            tokens=8,
            accumulation=4,
            targets={"published": None},
            rounds=report.rounds,
            warm_up=False,
        )
        return
    compare_sides(
        report,
        name="one layer of width 1536",
        shape=ONE_LAYER,
        layers=[0],
        tokens=128,
        accumulation=16,
        targets={"published": ">= 11"},
        rounds=2,
        warm_up=False,
    )

    # A step of the published form takes minutes here, so there is one round, without a warm-up.
    compare_sides(
        report,
        name="7B-shaped layer",
        shape=LLAMA2_7B_TWO_LAYERS,
        layers=[1],
        tokens=128,
        accumulation=4,
        targets={"published": ">= 8"},
        rounds=1,
        warm_up=False,
    )
    # Longer rows: the products of matrices take a larger part of the time.
    compare_sides(
        report,
        name="7B-shaped layer",
        shape=LLAMA2_7B_TWO_LAYERS,
        layers=[1],
        tokens=2048,
        accumulation=1,
        targets={"published": ">= 1.7"},
        rounds=1,
        warm_up=False,
    )
