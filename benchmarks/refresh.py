"""Refresh of one matrix: exact top-k threshold, mask and effective weight, against sort, kthvalue and a clone."""

from __future__ import annotations

import torch

from maskft.fast.selection import keep_highest_


def run(report) -> None:
    """Add the rows."""
    measure(report, (48, 64) if report.quick else (4096, 11008))


def measure(report, shape: tuple[int, int], is_compiled: bool = False) -> None:
    """Add the rows of a matrix of this shape; ``is_compiled``: also of the compiled refresh."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(shape, generator=generator) * 0.02).to(report.device)
    weight = torch.randn(shape, generator=generator).to(report.device)
    num = round(0.1 * scores.numel())
    for dtype in (torch.float32, torch.bfloat16):
        source, out = weight.to(dtype), torch.empty(shape, dtype=dtype, device=report.device)

        def refresh(out=out, source=source):
            keep_highest_(out, source, scores, num)

        name = f"refresh of {shape[0]} x {shape[1]} in {str(dtype).removeprefix('torch.')}"
        report.compare("refresh", f"{name} / clone of the scores", refresh, lambda: scores.clone(), "<= 3")
        if is_compiled:
            backend = "inductor" if report.device.type == "cuda" else "eager"
            try:
                report.compare("refresh", f"compiled / {name}", torch.compile(refresh, backend=backend), refresh)
            except Exception as error:  # no compiler: the rest is measured
                report.add("refresh", f"compiled / {name}", None, "x", error=str(error)[:300])
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
