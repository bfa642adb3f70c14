"""Planes and lines of a tiny model, against what the model says at the same weights."""

import json

import numpy as np
import pytest
import torch

import tiny
from maskft.loss import mean_nll, nll_per_item
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.analysis import landscape
from maskft_lab.analysis.landscape import analyse_landscape, plane_through, set_weights, weights_of
from maskft_lab.analysis.losses import Sampling

ROWS = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(4, 7).tolist()]


def loss_of(model):
    return mean_nll(nll_per_item(model, ROWS))


def small(seed=0):
    return tiny.tiny_llama(num_layers=1, seed=seed)


def test_the_plane_goes_through_its_three_models():
    points = [weights_of(small(seed)) for seed in range(3)]
    u, v, coordinates = plane_through(*points)
    model = small()
    for point, (x, y) in zip(points, coordinates, strict=True):
        set_weights(model, point, [])
        expected = loss_of(model)
        set_weights(model, points[0], [(float(x), u), (float(y), v)])
        assert loss_of(model) == pytest.approx(expected, rel=1e-4)
    distance = sum(float((points[2][name] - points[0][name]).double().pow(2).sum()) for name in u) ** 0.5
    assert np.linalg.norm(coordinates[2]) == pytest.approx(distance, rel=1e-5)
    middle = {name: (points[0][name] + points[1][name]) / 2 for name in u}
    for three in ((points[0], points[0], points[1]), (points[0], points[1], points[0]), (*points[:2], middle)):
        with pytest.raises(UserError, match="span no plane"):
            plane_through(*three)


@pytest.fixture
def three_models(tmp_path):
    for name, seed in (("fft", 0), ("continued", 1)):
        small(seed).save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(48, 32, generator=generator) > 0.1
    tiny.save_masks({"model.layers.0.mlp.up_proj": mask}, tmp_path / "mask")
    return [str(tmp_path / name) for name in ("fft", "continued", "mask")]


def test_a_landscape_that_was_cut_off_ends_as_one_that_was_not(three_models, tmp_path, monkeypatch):
    rows = {"train": ROWS, "heldout": ROWS[:2]}
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    analyse_landscape(whole, three_models, rows, Sampling(), grid=3)
    calls = []

    def stops_after_10(*args, **options):
        calls.append(None)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return nll_per_item(*args, **options)

    monkeypatch.setattr(landscape, "nll_per_item", stops_after_10)
    with pytest.raises(KeyboardInterrupt):
        analyse_landscape(cut, three_models, rows, Sampling(), grid=3)
    assert not cut.exists()
    analyse_landscape(cut, three_models, rows, Sampling(), grid=3)
    assert len(calls) == 2 * 9 + 1  # nine points, two splits; the one that was cut off twice
    assert cut.read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".*parts*"))
    monkeypatch.setattr(landscape, "load_model", None)
    analyse_landscape(cut, three_models, rows, Sampling(), grid=3)  # finished: nothing is loaded


def test_a_mask_of_values_other_than_zero_is_refused(three_models, tmp_path):
    file = tmp_path / "mask" / layout.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"removed_value": "base"}))
    with pytest.raises(UserError, match="does not only set weights to 0"):
        analyse_landscape(tmp_path / "a.json", three_models, {"train": ROWS}, Sampling(), grid=3)


def test_bad_input_ends_in_one_line(three_models, tmp_path, monkeypatch):
    rows, file = {"train": ROWS}, tmp_path / "a.json"
    with pytest.raises(UserError, match="--grid is 2; give 3 points"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=2)
    monkeypatch.setattr(landscape, "mean_nll", lambda losses: float("nan"))
    with pytest.raises(UserError, match="a number is NaN or infinite"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=3)
    assert not file.exists()
    monkeypatch.undo()
    tiny.tiny_llama(num_layers=2).save_pretrained(three_models[1])
    with pytest.raises(UserError, match="is not of the architecture"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=3)
