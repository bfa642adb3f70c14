"""Size of a coded mask, and the time to write and read it, against packed bits, the entropy bound and a pickle."""

from __future__ import annotations

import io
import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from maskft.masks.codec import HEADER_BYTES, decode_mask, encode_mask


def entropy(sparsity: float) -> float:
    """H(sparsity), bits per weight."""
    return -sparsity * math.log2(sparsity) - (1 - sparsity) * math.log2(1 - sparsity)


def run(report) -> None:
    """Add the rows; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # 0.0005: what Deletion Tuning removes of gate projections; 4096 x 11008: one of LLaMA2-7B's.
    shapes = [(48, 64)] if report.quick else [(4096, 11008), (512, 512)]
    for shape, sparsity in itertools.product(shapes, (0.0005, 0.01, 0.1, 0.3, 0.4, 0.5)):
        _measure(report, shape, sparsity)
    _adapter(report, *((2, shapes[0]) if report.quick else (32, (11008, 4096))), 0.0005)
    torch.set_num_threads(threads)


def _adapter(report, num_layers: int, shape: tuple[int, int], sparsity: float) -> None:
    """The file of an adapter of all gate projections of LLaMA2-7B, headers and names included."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(shape, generator=generator) >= sparsity for _ in range(num_layers))
    names = (f"base_model.model.model.layers.{n}.mlp.gate_proj.mask_coded" for n in range(num_layers))
    coded = {name: encode_mask(mask) for name, mask in zip(names, masks, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(coded, file)
        size = file.stat().st_size
    numel = num_layers * math.prod(shape)
    bound = entropy(sparsity) * numel / 8
    what = f"adapter of {num_layers} gate projections at {sparsity} / entropy"
    report.add("file", what, size / bound, "x", "<= 1.02", bytes=size, bound_bytes=bound, weights=numel)


def _measure(report, shape: tuple[int, int], sparsity: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= sparsity
    coded, exact = encode_mask(mask), 1 - float(mask.double().mean())
    assert torch.equal(decode_mask(coded, "matrix"), mask)
    encode_s, decode_s = _time(lambda: encode_mask(mask)), _time(lambda: decode_mask(coded, "matrix"))
    # Without the header: its 64 bytes, a sha256 among them, are a third of the smallest file.
    bits = 8 * (coded.numel() - HEADER_BYTES) / mask.numel()
    buffer = io.BytesIO()
    torch.save(mask.float(), buffer)
    report.add(
        "file",
        f"coded mask at sparsity {sparsity}, {shape[0]} x {shape[1]} / entropy",
        bits / entropy(exact),
        "x",
        "<= 1.02",
        bits_per_weight=bits,
        bytes=coded.numel(),
        bound_H=entropy(exact),
        pickle_fp32=8 * buffer.tell() / mask.numel(),
    )
    size = f"{shape[0]} x {shape[1]} at {sparsity}"
    is_large = mask.numel() > 10**6
    report.add("file", f"encoding {size}", mask.numel() / encode_s, "weights/s", ">= 1e8" if is_large else None)
    report.add("file", f"decoding {size}", mask.numel() / decode_s, "weights/s", ">= 1e8" if is_large else None)


def _time(function) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
