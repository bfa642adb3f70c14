"""The held-out loss of a row against float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from maskft.loss import mean_nll, nll_per_item

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
