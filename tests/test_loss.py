"""The held-out loss: by hand, and against float64."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from maskft import loss
from maskft.loss import HeldoutLoss, length_sorted_batches, mean_nll, nll_per_item, pad

VOCABULARY = 49152


class Peaked(nn.Module):
    """Logits of a sure model: all tokens but one have 1e-4 of the probability, each too little to be added to 1."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits_TV = 0.5 * torch.randn(12, VOCABULARY, generator=generator)
        self.logits_TV[:, 3] = 20

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        return SimpleNamespace(logits=self.logits_TV[logits_to_keep].expand(len(input_ids), -1, -1))


def test_a_large_vocabulary_costs_no_accuracy():
    model = Peaked()
    ids = torch.full((3, 12), 3)
    rows = [{"input_ids": row.tolist(), "labels": [-100] * 4 + row[4:].tolist()} for row in ids]
    found = nll_per_item(model, rows)
    for (nll, count), row in zip(found, ids, strict=True):
        expected = F.cross_entropy(model.logits_TV[3:11].double(), row[4:]).item()
        assert count == 8 and expected > 1e-4 and nll == pytest.approx(expected, abs=1e-9)


def test_the_loss_does_not_depend_on_which_rows_share_a_batch():
    """Rows of one to four answer tokens: the mean of the batches' means would differ by far more."""
    ids = tiny.token_ids(batch=16, length=12).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (8 + n % 4) + row[8 + n % 4 :]} for n, row in enumerate(ids)]
    losses = [mean_nll(nll_per_item(tiny.tiny_llama(), rows, batch_size=size)) for size in (1, 3, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_peak(dtype):
    model = Peaked()
    model.logits_TV = (10 + 4 * torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(1))).to(dtype)
    ids = torch.arange(12)
    row = {"input_ids": ids.tolist(), "labels": [-100] * 4 + ids[4:].tolist()}
    ((nll, count),) = nll_per_item(model, [row])
    expected = F.cross_entropy(model.logits_TV[3:11].double(), ids[4:]).item()
    assert count == 8 and expected > 5 and nll == pytest.approx(expected, abs=1e-7)


def test_a_device_without_float64_measures_in_float32(monkeypatch):
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert getattr(out, "dtype", None) != torch.float64, func
            return out

    assert loss.widest_float(torch.device("cpu")) == torch.float64
    assert loss.widest_float(torch.device("mps")) == torch.float32
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}]
    ((expected, _),) = nll_per_item(tiny.tiny_llama(), rows)
    monkeypatch.setattr(loss, "widest_float", lambda device: torch.float32)
    with NoFloat64():
        ((nll, count),) = nll_per_item(tiny.tiny_llama(), rows)
    assert nll == pytest.approx(expected, rel=1e-5) and count == 2


def test_the_mean_is_over_tokens_and_not_over_rows():
    """(1 x 3 + 4 x 1 + 0 x 0) / 4 tokens; the mean of the rows would be 5 / 3."""
    assert mean_nll([(1.0, 3), (4.0, 1), (0.0, 0)]) == 7 / 4
    assert mean_nll(iter([(2.0, 5)])) == 2.0
    assert math.isnan(mean_nll([(1.0, 3), (math.nan, 1)]))


def test_batches_hold_rows_of_similar_length_longest_first():
    assert length_sorted_batches([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    assert length_sorted_batches([3, 9], 8) == [[1, 0]]
    assert length_sorted_batches([], 8) == []


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding(side, ids, mask):
    padded, is_token = pad([[5, 6, 7], (8,)], 9, "cpu", side=side)
    assert padded.tolist() == ids and is_token.tolist() == mask
    assert padded.dtype == is_token.dtype == torch.int64
    if side == "right":
        assert torch.equal(pad([[5, 6, 7], [8]], 9, "cpu")[0], padded)
    assert pad([[], [5]], 9, "cpu", side=side)[0].tolist() == [[9], [5]], "a row may be empty"
    on_meta = pad([[5]], 9, "meta")
    assert [each.device.type for each in on_meta] == ["meta", "meta"]


class Uniform(nn.Module):
    """Logits of 0, so that each token costs log(vocabulary); it keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        self.asked.append((input_ids.tolist(), attention_mask.tolist(), logits_to_keep.tolist(), use_cache))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape[:1], len(logits_to_keep), 50))


def test_logits_are_computed_from_the_first_label_on():
    model = Uniform().train()
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, -100, -100, 5, 6]},
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [1], "labels": [1]},
    ]
    calls = []
    found = nll_per_item(model, rows, batch_size=2, pad_token_id=9, on_loss=lambda *call: calls.append(call))
    assert found == [(pytest.approx(math.log(50)), 2), (pytest.approx(math.log(50)), 1), (0.0, 0), (0.0, 0)]
    assert calls == list(enumerate(found)), "in the order of length, which is theirs"
    assert not model.training
    # The first answer token of the first batch is at 3: the logits of 2 and later are needed.
    assert model.asked == [
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9]], [[1] * 6, [1] * 4 + [0] * 2], [2, 3, 4], False),
        ([[1, 2], [1, 9]], [[1, 1], [1, 0]], [0], False),
    ]


def test_each_position_is_normalised_by_itself():
    """Were it by the highest logit of all positions, exp(-300) would be 0 in float32 and the loss infinite."""
    model = Uniform()
    logits_TV = torch.zeros(3, 50)
    logits_TV[0] = 300.0
    model.forward = lambda input_ids, logits_to_keep, **_: SimpleNamespace(logits=logits_TV[logits_to_keep][None])
    row = {"input_ids": [1, 2, 3, 0], "labels": [1, 2, 3, 0]}
    assert nll_per_item(model, [row]) == [(pytest.approx(math.log(50)), 3)]


def test_a_target_of_token_zero_is_token_zero():
    model = Uniform()
    logits_TV = torch.zeros(3, 50)
    logits_TV[:, 0] = 5.0
    model.forward = lambda input_ids, logits_to_keep, **_: SimpleNamespace(logits=logits_TV[logits_to_keep][None])
    row = {"input_ids": [0, 0, 0, 0], "labels": [0, 0, 0, 0]}
    expected = math.log(49 + math.exp(5.0)) - 5.0
    assert nll_per_item(model, [row]) == [(pytest.approx(expected), 3)]


def test_batches_and_padding_of_a_run_are_those_it_was_given():
    model = Uniform()
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    HeldoutLoss(model, batch_size=1, pad_token_id=7)(rows)
    HeldoutLoss(model, batch_size=2, pad_token_id=7)(rows)
    assert [ids for ids, *_ in model.asked] == [[[1, 2, 3]], [[4, 5]], [[1, 2, 3], [4, 5, 7]]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_processes_share_rows_and_all_have_all_losses(world, num_rows, monkeypatch):
    """Each process in turn, with what the others would have sent."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(num_rows, 6).tolist()]
    model = tiny.tiny_llama()
    expected = nll_per_item(model, rows)
    monkeypatch.setattr(loss.processes, "num_processes", lambda: world)

    shares = []
    for rank in range(world):
        monkeypatch.setattr(loss.processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(loss.processes, "gather", lambda share: [shares.append(share)] and [share])
        HeldoutLoss(model, batch_size=2, pad_token_id=0)(rows)
    indices = [own for own, _ in shares]
    assert len({len(own) for own in indices}) == 1, "all run the same number of batches"
    assert {index for own in indices for index in own} == set(range(num_rows))
    assert sum(map(len, indices)) < num_rows + world

    monkeypatch.setattr(loss.processes, "gather", lambda share: shares)
    entered = []

    def context():
        entered.append(True)
        return torch.autocast("cpu", enabled=False)

    found = HeldoutLoss(model, batch_size=2, pad_token_id=0, context=context)(rows)
    assert [nll for nll, _ in found] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert [count for _, count in found] == [5] * num_rows
    assert entered == [True]
