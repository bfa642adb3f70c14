"""Size of a coded mask, and the time to write and read it, against packed bits, the entropy bound and a pickle."""

from __future__ import annotations

import io
import math
import statistics
import time

import torch

from maskft.tuner.codec import decode_mask, encode_mask


def entropy(sparsity: float) -> float:
    """H(sparsity), bits per weight."""
    return -sparsity * math.log2(sparsity) - (1 - sparsity) * math.log2(1 - sparsity)


def run(report) -> None:
    """Add the rows; one thread."""
    shape = (48, 64) if report.quick else (4096, 11008)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # 0.0005: what Bit-Mask Tuning removes of gate projections, here of one of LLaMA2-7B's.
    slack = {0.0005: 1.02, 0.01: 1.03, 0.3: 1.08}
    targets = {sparsity: factor * entropy(sparsity) for sparsity, factor in slack.items()} | {0.1: 0.48, 0.5: 1.01}
    for sparsity, bound in targets.items():
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity
        coded = encode_mask(mask)
        assert torch.equal(decode_mask(coded, "matrix"), mask)
        encode_s, decode_s = _time(lambda m=mask: encode_mask(m)), _time(lambda c=coded: decode_mask(c, "matrix"))
        bits = 8 * coded.numel() / mask.numel()
        buffer = io.BytesIO()
        torch.save(mask.float(), buffer)
        report.add(
            "file",
            f"coded mask at sparsity {sparsity}, {shape[0]} x {shape[1]}",
            bits,
            "bit/weight",
            f"<= {bound:.4f}",
            bytes=coded.numel(),
            bound_H=entropy(sparsity),
            packed=1.0,
            pickle_fp32=8 * buffer.tell() / mask.numel(),
            encode_weights_per_s=mask.numel() / encode_s,
        )
        report.add("file", f"decoding at sparsity {sparsity}", mask.numel() / decode_s, "weights/s", ">= 1e8")
    torch.set_num_threads(threads)


def _time(function) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
