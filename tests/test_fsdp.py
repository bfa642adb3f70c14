"""Masks of shards: the ranks are threads that exchange counts, the reference is the whole matrix on one rank."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskft.fsdp import _check_sharding, refresh_masks, remove_lowest_of_shards
from maskft.masking import ranking_keys, remove_lowest
from maskft_common.errors import NotFiniteError, UserError


class Ranks:
    """Collectives between threads: each hands in a tensor and gets those of all, in rank order."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)

    def exchange(self, rank, tensor):
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        out = torch.stack(self.slots)
        self.barrier.wait()
        return out

    def run(self, function):
        results = [None] * self.size

        def call(rank):
            try:
                results[rank] = function(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return results


def in_shards(matrix, num, size, rank_by="abs"):
    """What every rank returns, given ``size`` ranks and rows spread as FSDP spreads them."""
    ranks = Ranks(size)

    def rows(matrix, rank):
        chunks = matrix.chunk(size)
        return chunks[rank] if rank < len(chunks) else matrix[:0]

    def one(rank):
        return remove_lowest_of_shards(
            ranking_keys(rows(matrix, rank), rank_by),
            num,
            rank,
            lambda counts: ranks.exchange(rank, counts).sum(0),
            lambda counts: ranks.exchange(rank, counts),
        )

    return ranks.run(one)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def few_values(*shape, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float() * 0.5


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "matrix",
    [
        normal(64, 48),
        normal(7, 5),  # 4 ranks hold 2, 2, 2, 1 rows
        normal(5, 3),  # 4 ranks hold 2, 2, 1, 0 rows
        few_values(9, 4),
        torch.zeros(6, 6),
        torch.tensor([[0.0, -0.0], [-0.0, 0.0], [1.0, float("inf")]]),
    ],
)
def test_the_mask_of_shards_is_the_mask_of_the_whole(matrix, size, rank_by):
    for num in sorted({0, 1, matrix.numel() // 10, matrix.numel() // 2, matrix.numel() - 1, matrix.numel()}):
        expected = remove_lowest(ranking_keys(matrix, rank_by), num)
        assert torch.equal(torch.cat(in_shards(matrix, num, size, rank_by)), expected)


def test_a_nan_on_one_rank_stops_every_rank():
    scores = normal(8, 4)
    scores[7, 3] = float("nan")
    assert all(isinstance(result, NotFiniteError) for result in in_shards(scores, 3, 4))


def test_quantised_weights_cannot_be_sharded():
    layer = SimpleNamespace(module_name="up", quantization_backend=object())
    with pytest.raises(UserError, match="up is quantised, and masks over quantised weights cannot be sharded"):
        _check_sharding(layer)


def test_rows_are_written_before_fsdp_reads_them_in_a_stream_of_its_own(monkeypatch):
    """Its streams wait for this one in the hook of the outermost module, before masks are refreshed."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("waited"))
    monkeypatch.setattr("torch.accelerator.current_stream", lambda device: waited.append(device.type) or stream)
    monkeypatch.setattr("maskft.fsdp.dist.is_initialized", lambda: True)
    for device in ("cpu", "meta"):
        masker = SimpleNamespace(is_current=lambda: False, show=lambda device=device: waited.append(f"on {device}"))
        layer = SimpleNamespace(weight=torch.empty(1, device=device))
        monkeypatch.setattr("maskft.fsdp._attached", lambda layers, found=masker: [found])
        monkeypatch.setattr("maskft.fsdp._sharded_layers", lambda model, found=layer: [found])
        refresh_masks(nn.Linear(1, 1))
    assert waited == ["on cpu", "on meta", "meta", "waited"]
