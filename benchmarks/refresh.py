"""Refresh of one matrix: exact top-k threshold, mask and effective weight, against sort, kthvalue and a clone."""

from __future__ import annotations

import os

import torch

from maskft.tuner.selection import keep_highest_


def run(report) -> None:
    """Add the rows."""
    measure(report, (48, 64) if report.quick else (4096, 11008))


def measure(report, shape: tuple[int, int], others: tuple[str, ...] = ()) -> None:
    """Add the rows of a matrix of this shape; ``others``: of ``Triton`` and ``compiled``."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(shape, generator=generator) * 0.02).to(report.device)
    weight = torch.randn(shape, generator=generator).to(report.device)
    num = round(0.1 * scores.numel())
    for dtype in (torch.float32, torch.bfloat16):
        source, out = weight.to(dtype), torch.empty(shape, dtype=dtype, device=report.device)

        def refresh(out=out, source=source):
            keep_highest_(out, source, scores, num)

        def with_kernel(refresh=refresh):
            os.environ["MASKFT_TRITON"] = "1"
            try:
                refresh()
            finally:
                os.environ.pop("MASKFT_TRITON")

        name = f"refresh of {shape[0]} x {shape[1]} in {str(dtype).removeprefix('torch.')}"
        report.compare("refresh", f"{name} / clone of the scores", refresh, lambda: scores.clone(), "<= 3")
        for how in others:
            backend = "inductor" if report.device.type == "cuda" else "eager"
            other = with_kernel if how == "Triton" else torch.compile(refresh, backend=backend)
            try:
                report.compare("refresh", f"{how} / {name}", other, refresh)
            except Exception as error:  # no compiler: the rest is measured
                report.add("refresh", f"{how} / {name}", None, "x", error=str(error)[:300])
        if dtype == torch.float32:
            # The other sides are slower than a clone by one to two orders, so that few rounds are enough.
            few = min(3, report.rounds)
            report.compare("refresh", f"sort / {name}", lambda: scores.abs().view(-1).sort(), refresh, ">= 25", few)
            report.compare(
                "refresh", f"kthvalue / {name}", lambda: scores.abs().view(-1).kthvalue(num), refresh, None, few
            )
            order = scores.abs().view(-1).sort(stable=True).indices
            expected = source.clone()
            expected.view(-1)[order[:num]] = 0
            assert torch.equal(out, expected), "not what sorting gives"
