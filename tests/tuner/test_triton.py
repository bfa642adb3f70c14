"""The Triton kernel, in Triton's interpreter (``make test-triton``) and on a GPU: bit for bit the plain definition."""

import importlib
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from maskft import masking
from maskft.tuner import selection
from maskft_base.errors import NotFiniteError
from reference import FEW_VALUES

pytest.importorskip("triton", reason="needs maskft[triton]")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

triton_split = importlib.import_module("maskft.tuner.triton_split")
ON = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.gpu


@pytest.fixture
def calls(monkeypatch):
    """How many matrices the kernel took; small pools are sampled too."""
    found, split = [], triton_split.split_matrix_
    monkeypatch.setattr(selection, "_uses_triton", lambda device: True)
    monkeypatch.setattr(selection, "_SAMPLED_MIN_NUMEL", 1)
    monkeypatch.setattr(triton_split, "split_matrix_", lambda *args: found.append(1) or split(*args))
    return found


@pytest.mark.parametrize("rank_by", ["abs", "signed"])
@pytest.mark.parametrize("of_weight, of_out", [("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("kind", ["distinct", "ties", "tiny", "infinite", "bfloat16"])
def test_many_scores(calls, rank_by, of_weight, of_out, kind):
    n = 3 * triton_split.BLOCK + 5
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "tiny":
        scores *= 1e-39
    elif kind == "infinite":
        scores[::7], scores[1::7] = math.inf, -math.inf
    elif kind == "bfloat16":
        scores = scores.bfloat16()
    weight = torch.randn(n).to(getattr(torch, of_weight))
    weight[:4] = torch.tensor([math.nan, -0.0, math.inf, -math.inf])
    for sparsity in (0.0, 0.1, 0.9, 1.0):
        num = round(sparsity * n)
        keep = masking.remove_lowest(masking.ranking_keys(scores, rank_by), num)
        expected = weight.to(getattr(torch, of_out)).masked_fill(~keep, 0)
        out = torch.full_like(expected, 7.0).to(ON)
        selection.keep_highest_(out, weight.to(ON), scores.to(ON), num, rank_by)
        bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
        assert torch.equal(out.cpu().view(bits), expected.view(bits))
    assert calls


@given(*FEW_VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_few_values(calls, values, num, rank_by):
    scores = torch.tensor(values, dtype=torch.float32)
    num = min(num, len(scores))
    plain = masking.remove_lowest(masking.ranking_keys(scores, rank_by), num)
    assert torch.equal(selection.mask_without_lowest(scores.to(ON), num, rank_by).cpu(), plain)


def test_a_band_of_more_than_there_are_places_for(calls, monkeypatch):
    monkeypatch.setattr(triton_split, "_MIN_PLACES", 4)
    monkeypatch.setattr(triton_split, "_PLACES_OF_NUMEL", 10**9)
    scores = torch.randn(5_000)
    mask = selection.topk_mask(scores.to(ON), 0.3).cpu()
    assert calls and torch.equal(mask, masking.topk_mask(scores, 0.3))


def test_scores_with_nan_are_refused(calls):
    scores = torch.randn(5_000)
    scores[4_321] = math.nan
    with pytest.raises(NotFiniteError, match="scores contain NaN"):
        selection.topk_mask(scores.to(ON), 0.3)


@pytest.mark.gpu
def test_time_on_a_gpu(monkeypatch, capsys):
    """Prints what the kernel saves; beside it, the same bits."""
    scores, weight = torch.randn(4096, 11008, device="cuda"), torch.randn(4096, 11008, device="cuda")
    outs = {}
    for asked in ("0", "1"):
        monkeypatch.setenv("MASKFT_TRITON", asked)
        out = outs[asked] = torch.empty_like(weight)
        for timed in (False, True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(20):
                selection.keep_highest_(out, weight, scores, round(0.1 * scores.numel()))
            end.record()
            torch.cuda.synchronize()
            if timed:
                with capsys.disabled():
                    print(f"refresh of 4096 x 11008, MASKFT_TRITON={asked}: {begin.elapsed_time(end) / 20:.3f} ms")
    assert torch.equal(outs["0"], outs["1"])
