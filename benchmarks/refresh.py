"""Refresh of one matrix: exact top-k threshold, mask and effective weight, against sort, kthvalue and a clone."""

from __future__ import annotations

import torch

from maskft.fast.selection import keep_highest_


def run(report) -> None:
    """Add the rows."""
    shape = (48, 64) if report.quick else (4096, 11008)  # a matrix of LLaMA2-7B
    measure(report, shape)


def measure(
    report,
    shape: tuple[int, int],
    is_compiled: bool = False,
) -> None:
    """Add the rows of a matrix of this shape; ``is_compiled``: also of the compiled refresh."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(shape, generator=generator) * 0.02).to(report.device)
    weight = torch.randn(shape, generator=generator).to(report.device)
    num_removed = round(0.1 * scores.numel())

    def clone():
        scores.clone()

    def sort():
        scores.abs().view(-1).sort()

    def kthvalue():
        scores.abs().view(-1).kthvalue(num_removed)

    for dtype in (torch.float32, torch.bfloat16):
        source = weight.to(dtype)
        out = torch.empty(shape, dtype=dtype, device=report.device)

        # Defaults, because a function reads variables of a loop when it is called.
        def refresh(out=out, source=source):
            keep_highest_(out, source, scores, num_removed)

        dtype_name = str(dtype).removeprefix("torch.")
        name = f"refresh of {shape[0]} x {shape[1]} in {dtype_name}"
        report.compare("refresh", f"{name} / clone of the scores", refresh, clone, "<= 3")
        if is_compiled:
            backend = "inductor" if report.device.type == "cuda" else "eager"
            try:
                report.compare("refresh", f"compiled / {name}", torch.compile(refresh, backend=backend), refresh)
            except Exception as error:  # no compiler: the rest is measured
                report.add(
                    "refresh",
                    f"compiled / {name}",
                    None,
                    "x",
                    error=str(error)[:300],
                )
        if dtype == torch.float32:
            # These are slower than a refresh by one to two orders of magnitude, so few rounds are enough.
            few_rounds = min(3, report.rounds)
            report.compare("refresh", f"sort / {name}", sort, refresh, ">= 25", few_rounds)
            report.compare("refresh", f"kthvalue / {name}", kthvalue, refresh, None, few_rounds)

            # The refresh removes the weights that sorting removes, also among equal scores.
            order = scores.abs().view(-1).sort(stable=True).indices
            expected = source.clone()
            expected.view(-1)[order[:num_removed]] = 0
            assert torch.equal(out, expected), "a refresh differs from sorting"
