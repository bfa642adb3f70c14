"""The frozen-prefix cache over a sweep: two epochs at each of three sparsities, with the cache and without."""

from __future__ import annotations

import tempfile
import time

import torch
from peft import get_peft_model

from maskft import MaskConfig
from maskft.training.prefix_cache import PrefixCache

from .common import SMOLLM2, TINY, autocast, build

SPARSITIES, EPOCHS, BATCH = (0.05, 0.1, 0.2), 2, 4


def run(report) -> None:
    """Add the rows."""
    shape, layers, rows, tokens = (TINY, [2, 3], 8, 8) if report.quick else (SMOLLM2, [20, 21, 22, 23], 32, 128)
    ids = torch.randint(shape["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(0))
    plain_s = cached_s = 0.0
    plain, cached = [], []
    with tempfile.TemporaryDirectory() as folder:
        _run(report, shape, layers, ids[:BATCH], 0.1, None)  # not counted
        for sparsity in SPARSITIES:
            seconds, losses, _ = _run(report, shape, layers, ids, sparsity, None)
            plain_s, plain = plain_s + seconds, plain + losses
            seconds, losses, size = _run(report, shape, layers, ids, sparsity, folder)
            cached_s, cached = cached_s + seconds, cached + losses
    report.add(
        "prefix",
        f"{EPOCHS} epochs x {len(SPARSITIES)} sparsities: without / with the cache",
        plain_s / cached_s,
        "x",
        without_s=plain_s,
        with_s=cached_s,
        kept_bytes=size,
        largest_loss_difference=max(abs(a - b) for a, b in zip(plain, cached, strict=True)),
    )


def _run(report, shape, layers, ids, sparsity, folder) -> tuple[float, list[float], int]:
    """Time, losses and bytes kept of one run; opening the cache is part of its time."""
    model = get_peft_model(
        build(shape, report.device), MaskConfig(sparsity=sparsity, layers_to_transform=layers)
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    losses, size = [], 0
    started = time.perf_counter()
    cache = None if folder is None else PrefixCache(model, folder, 1e10, torch.bfloat16)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(BATCH):
            batch = ids[rows].to(report.device)
            with autocast(report.device):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    if cache is not None:
        size = cache.num_bytes
        cache.remove()
    return seconds, losses, size
