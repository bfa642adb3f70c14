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
    """H(sparsity), bits per weight: no code of random masks can be shorter."""
    density = 1 - sparsity
    return -sparsity * math.log2(sparsity) - density * math.log2(density)


def run(report) -> None:
    """Add the rows; one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # 4096 x 11008 is a matrix of LLaMA2-7B, and 0.0005 the sparsity of Deletion Tuning in gate projections.
    if report.quick:
        shapes = [(48, 64)]
        num_layers = 2
        gate_shape = (48, 64)
    else:
        shapes = [(4096, 11008), (512, 512)]
        num_layers = 32
        gate_shape = (11008, 4096)
    for shape, sparsity in itertools.product(shapes, (0.0005, 0.01, 0.1, 0.3, 0.4, 0.5)):
        _measure(report, shape, sparsity)
    _adapter(report, num_layers, gate_shape, 0.0005)
    torch.set_num_threads(num_threads)


def _adapter(
    report,
    num_layers: int,
    shape: tuple[int, int],
    sparsity: float,
) -> None:
    """The file of an adapter of all gate projections of LLaMA2-7B, headers and names included."""
    generator = torch.Generator().manual_seed(0)
    coded = {}
    for layer in range(num_layers):
        # Coded one by one: all masks as bools would take more than a gigabyte.
        mask = torch.rand(shape, generator=generator) >= sparsity
        coded[f"base_model.model.model.layers.{layer}.mlp.gate_proj.mask_coded"] = encode_mask(mask)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        save_file(coded, file)
        size = file.stat().st_size
    numel = num_layers * math.prod(shape)
    bound = entropy(sparsity) * numel / 8
    what = f"adapter of {num_layers} gate projections at {sparsity} / entropy"
    report.add(
        "file",
        what,
        size / bound,
        "x",
        "<= 1.02",
        bytes=size,
        bound_bytes=bound,
        weights=numel,
    )


def _measure(report, shape: tuple[int, int], sparsity: float) -> None:
    """Size and speed of one coded mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) >= sparsity
    coded = encode_mask(mask)
    assert torch.equal(decode_mask(coded, "matrix"), mask)

    # The bound of this mask, whose sparsity is not exactly the one that was drawn with.
    bound = entropy(1 - float(mask.double().mean()))
    # Without the header: its 64 bytes, a sha256 among them, are a third of the smallest file.
    bits = 8 * (coded.numel() - HEADER_BYTES) / mask.numel()

    # For comparison, a pickle of the mask as float32.
    buffer = io.BytesIO()
    torch.save(mask.float(), buffer)
    pickle_bits = 8 * buffer.tell() / mask.numel()
    report.add(
        "file",
        f"coded mask at sparsity {sparsity}, {shape[0]} x {shape[1]} / entropy",
        bits / bound,
        "x",
        "<= 1.02",
        bits_per_weight=bits,
        bytes=coded.numel(),
        bound_H=bound,
        pickle_fp32=pickle_bits,
    )

    size = f"{shape[0]} x {shape[1]} at {sparsity}"
    target = ">= 1e8" if mask.numel() > 10**6 else None  # of a small one the time is that of the calls
    encode_s = _time(lambda: encode_mask(mask))
    decode_s = _time(lambda: decode_mask(coded, "matrix"))
    threads = torch.get_num_threads()  # one, whatever the settings of the report say
    report.add("file", f"encoding {size}", mask.numel() / encode_s, "weights/s", target, threads=threads)
    report.add("file", f"decoding {size}", mask.numel() / decode_s, "weights/s", target, threads=threads)


def _time(function) -> float:
    """Median of three calls, in seconds."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
