"""Traces and eigenvalues: a quadratic whose spectrum is known, then a tiny model against its whole Hessian."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from maskft_common.errors import UserError
from maskft_lab.analysis import curvature
from maskft_lab.analysis.curvature import (
    analyse_curvature,
    hessian_products,
    largest_eigenvalue,
    operator_product,
    quadratic_forms,
    trace_estimate,
)
from maskft_lab.analysis.losses import Sampling, make_batches
from maskft_lab.store import Store

SPECTRUM = np.array([9.0, 4, 1, 0.5, 0.25, -2])


class Square(nn.Module):
    """Half of x^T A x: its Hessian is A, whatever x is."""

    def __init__(self, matrix):
        super().__init__()
        self.x = nn.Parameter(torch.ones(len(matrix)))
        self.matrix = matrix

    def forward(self, scale):
        return scale * (0.5 * self.x @ self.matrix @ self.x).reshape(1)


class Value(nn.Module):
    reduction = "mean"

    def forward(self, prediction, target):
        return prediction.mean()


@pytest.fixture
def quadratic():
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    matrix = basis @ torch.diag(torch.tensor(SPECTRUM, dtype=torch.float32)) @ basis.T
    model = Square(matrix)
    batches = [operator_product(model, Value(), [model.x], torch.tensor([s]), torch.zeros(1)) for s in (0.5, 1.5)]
    return matrix.double().numpy(), batches


def test_a_quadratic_with_a_known_spectrum(quadratic, tmp_path):
    matrix, products = quadratic
    shares, kept = np.array([0.5, 0.5]), np.ones(6, dtype=bool)
    found = largest_eigenvalue(products, shares, kept, seed=0)
    assert found["eigenvalue"] == pytest.approx(9, rel=1e-4)
    assert found["smallest"] == pytest.approx(-2, rel=1e-3)
    # Batches have 0.5 and 1.5 times the Hessian: the standard error of their mean is half of it.
    assert found["stderr_rows"] == pytest.approx(4.5, rel=1e-3)
    forms = quadratic_forms(products, kept, 100, 0, Store(tmp_path / "a.jsonl", {}), "h")
    estimate = trace_estimate(forms, shares)
    # Of Rademacher vectors, the variance is twice the sum of the squares off the diagonal.
    variance = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert estimate["stderr_probes"] == pytest.approx((variance / 100) ** 0.5, rel=0.3)
    assert abs(estimate["trace"] - SPECTRUM.sum()) < 4 * estimate["stderr_probes"]
    assert estimate["stderr_rows"] == pytest.approx(0.5 * estimate["trace"], rel=1e-5)


def test_the_projection_is_p_h_p(quadratic, tmp_path):
    matrix, products = quadratic
    kept = np.array([True, True, False, True, False, True])
    shares, inner = np.array([0.5, 0.5]), matrix[kept][:, kept]
    found = largest_eigenvalue(products, shares, kept, seed=0)
    assert found["eigenvalue"] == pytest.approx(np.linalg.eigvalsh(inner)[-1], rel=1e-3)
    assert found["eigenvalue"] <= 9 + 1e-6  # Eq. 18, true of every projection
    forms = quadratic_forms(products, kept, 100, 0, Store(tmp_path / "a.jsonl", {}), "h")
    estimate = trace_estimate(forms, shares)
    assert abs(estimate["trace"] - np.trace(inner)) < 4 * estimate["stderr_probes"]
    assert trace_estimate(forms[:1, :1], np.ones(1))["stderr_rows"] is None


@pytest.mark.parametrize("factor", [0.0, np.nan])
def test_a_hessian_that_lanczos_cannot_take_is_one_message(factor):
    """A model whose loss is not finite has products with NaN."""
    products = [lambda vector: factor * vector]
    with pytest.raises(UserError, match=r"the largest eigenvalue cannot be computed .*losses are finite"):
        largest_eigenvalue(products, np.ones(1), np.ones(6, dtype=bool), seed=0)


def test_a_hessian_with_nan_is_told_at_the_first_probe(tmp_path):
    calls = []

    def product(vector):
        calls.append(vector)
        return np.nan * vector

    pieces = Store(tmp_path / "parts.jsonl", {})
    with pytest.raises(UserError, match="the Hessian is NaN or infinite"):
        quadratic_forms([product] * 2, np.ones(6, dtype=bool), 4, 0, pieces, "all")
    assert len(calls) == 1 and not pieces.values


def rows(count=4, length=6):
    return [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(count, length).tolist()]


def tiny_model():
    return tiny.tiny_llama(
        num_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=4, num_key_value_heads=1,
        head_dim=2, attn_implementation="eager",
    )  # fmt: skip


def test_products_of_a_model_are_those_of_double_backward():
    model, names = tiny_model(), ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.k_proj"]
    batch = make_batches(rows(), 4)[0]
    weights = [model.get_submodule(name).weight for name in names]
    logits, targets = model(batch[0]).logits[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten()
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, targets), weights, create_graph=True)
    vector = torch.randn(sum(weight.numel() for weight in weights))
    parts = vector.split([weight.numel() for weight in weights])
    inner = sum((g.flatten() * v).sum() for g, v in zip(gradients, parts, strict=True))
    expected = torch.cat([each.flatten() for each in torch.autograd.grad(inner, weights)])
    (product,) = hessian_products(model, names, [batch])
    np.testing.assert_allclose(product(vector.double().numpy()), expected.double().numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        ("model.layers.7.self_attn.k_proj", (2, 8), "the model has no module model.layers.7.self_attn.k_proj"),
        ("model.layers.0.self_attn.k_proj", (4, 8), "differ in shape"),
        ("model.layers.0.self_attn.k_proj", None, "removes all weights of its matrices"),
    ],
)
def test_a_mask_that_does_not_fit_is_told_before_the_first_hessian(module, shape, message, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "start")
    mask = torch.zeros(2, 8, dtype=torch.bool) if shape is None else torch.ones(shape, dtype=torch.bool)
    tiny.save_masks({module: mask}, tmp_path / "mask")
    monkeypatch.setattr(curvature, "hessian_products", None)
    with pytest.raises(UserError, match=message):
        analyse_curvature(tmp_path / "c.json", str(tmp_path / "start"), str(tmp_path / "mask"), rows(), 2, Sampling(4))


def test_curvature_of_a_mask_is_computed_once(tmp_path, monkeypatch):
    folder, adapter = tmp_path / "start", tmp_path / "mask"
    tiny_model().save_pretrained(folder)
    mask = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) > 0.2
    tiny.save_masks({"model.layers.0.self_attn.k_proj": mask}, adapter)
    file = tmp_path / "curvature.json"
    arguments = (str(folder), str(adapter), rows(), 2, Sampling(4))
    analyse_curvature(file, *arguments)
    record = json.loads(file.read_text())
    assert record["num_weights"] == 16 and record["density"] == pytest.approx(float(mask.float().mean()))
    largest = {name: record[name]["largest"] for name in ("start_all", "start_kept")}
    assert largest["start_kept"]["eigenvalue"] <= largest["start_all"]["eigenvalue"] * 1.001
    assert largest["start_all"]["stderr_rows"] is None  # of one batch
    start, end = (record[name]["trace"] for name in ("start_all", "mask_all"))
    assert record["mask_all"]["less_start_all"]["trace"] == pytest.approx(end - start) and end != start
    monkeypatch.setattr(curvature, "load_model", None)  # finished: nothing is loaded
    analyse_curvature(file, *arguments)
