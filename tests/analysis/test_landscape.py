"""Directions, planes and surfaces of a tiny model, against what the model says at the same weights."""

import json

import numpy as np
import pytest
import torch

import tiny
from maskft_base import files
from maskft_base.errors import UserError
from maskft_lab.analysis import landscape
from maskft_lab.analysis.landscape import analyse_landscape, filter_normalised, line, plane_through, surface
from maskft_lab.analysis.losses import make_batches, mean_loss
from maskft_lab.analysis.points import Point, set_weights, weights_of
from maskft_lab.analysis.store import Parts

ROWS = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(4, 7).tolist()]


def small(seed=0):
    return tiny.tiny_llama(num_layers=1, seed=seed)


def test_filters_of_a_direction_are_as_long_as_the_models():
    weights = weights_of(small())
    direction = filter_normalised(weights, seed=3)
    assert all(weights[name].dim() == 1 for name in weights.keys() - direction.keys())
    for name, each in direction.items():
        torch.testing.assert_close(each.norm(dim=1), weights[name].norm(dim=1))
    again, other = filter_normalised(weights, seed=3), filter_normalised(weights, seed=4)
    assert all(torch.equal(again[name], direction[name]) for name in direction)
    assert all(not torch.equal(other[name], direction[name]) for name in direction)


def test_a_surface_is_the_loss_at_its_points_in_any_order(tmp_path):
    model = small()
    center, losses = weights_of(model), {"train": make_batches(ROWS, 3)}
    at_center = mean_loss(model, losses["train"])
    directions = filter_normalised(center, 0), filter_normalised(center, 1)
    axes = np.array([-0.5, 0.0, 0.5]), np.array([0.0, 1.0])
    found = np.array(surface(model, center, directions, axes, losses, Parts(tmp_path / "a.json", {}, 9), "s")["train"])
    assert found.shape == (3, 2) and found[1, 0] == at_center
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = center[name] + 0.5 * directions[0].get(name, 0) + directions[1].get(name, 0)
            parameter.copy_(moved)
    assert found[2, 1] == pytest.approx(mean_loss(model, losses["train"]), rel=1e-5)
    set_weights(model, center, [(0.5, directions[0]), (1.0, directions[1])])
    assert found[2, 1] == mean_loss(model, losses["train"])


def test_the_plane_goes_through_its_three_models():
    points = [weights_of(small(seed)) for seed in range(3)]
    u, v, coordinates = plane_through(*points)
    model, losses = small(), make_batches(ROWS, 4)
    for point, (x, y) in zip(points, coordinates, strict=True):
        set_weights(model, point)
        expected = mean_loss(model, losses)
        set_weights(model, points[0], [(float(x), u), (float(y), v)])
        assert mean_loss(model, losses) == pytest.approx(expected, rel=1e-4)
    distance = sum(float((points[2][name] - points[0][name]).double().pow(2).sum()) for name in u) ** 0.5
    assert np.linalg.norm(coordinates[2]) == pytest.approx(distance, rel=1e-5)
    middle = {name: (points[0][name] + points[1][name]) / 2 for name in u}
    for three in ((points[0], points[0], points[1]), (points[0], points[1], points[0]), (*points[:2], middle)):
        with pytest.raises(UserError, match="span no plane"):
            plane_through(*three)


def test_a_line_begins_and_ends_at_its_models(tmp_path):
    model, losses = small(), {"heldout": make_batches(ROWS, 4)}
    start, end = weights_of(small(0)), weights_of(small(1))
    amounts = np.array([0.0, 0.5, 1.0])
    found = line(model, start, end, amounts, losses, Parts(tmp_path / "a.json", {}, 9), "l")["heldout"]
    for value, point in ((found[0], start), (found[2], end)):
        set_weights(model, point)
        assert value == pytest.approx(mean_loss(model, losses["heldout"]), rel=1e-5)


@pytest.fixture
def three_models(tmp_path):
    for name, seed in (("fft", 0), ("continued", 1)):
        small(seed).save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(48, 32, generator=generator) > 0.1
    tiny.save_masks({"model.layers.0.mlp.up_proj": mask}, tmp_path / "mask")
    fft = str(tmp_path / "fft")
    continued, mask = Point(str(tmp_path / "continued")), Point(fft, str(tmp_path / "mask"))
    return {"fft": Point(fft), "continued": continued, "mask": mask}


def test_a_landscape_that_was_cut_off_ends_as_one_that_was_not(three_models, tmp_path, monkeypatch):
    rows = {"train": ROWS, "heldout": ROWS[:2]}
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    analyse_landscape(whole, three_models, rows, grid=3)
    calls = []

    def stops_after_20(model, batches):
        calls.append(None)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return mean_loss(model, batches)

    monkeypatch.setattr(landscape, "mean_loss", stops_after_20)
    with pytest.raises(KeyboardInterrupt):
        analyse_landscape(cut, three_models, rows, grid=3)
    assert not cut.exists()
    analyse_landscape(cut, three_models, rows, grid=3)
    # Four surfaces of nine points and three lines of three, two splits; the one that was cut off twice.
    assert len(calls) == 2 * (4 * 9 + 3 * 3) + 1
    assert cut.read_bytes() == whole.read_bytes() and not list(tmp_path.glob(".*parts*"))
    record = json.loads(whole.read_text())
    assert record["surfaces"]["mask"]["train"][1][1] != record["surfaces"]["fft"]["train"][1][1]
    monkeypatch.setattr(landscape, "load_model", None)
    analyse_landscape(cut, three_models, rows, grid=3)  # finished: nothing is loaded


def test_other_models_stand_beside_the_three(three_models, tmp_path):
    rows, file = {"train": ROWS}, tmp_path / "a.json"
    small(2).save_pretrained(tmp_path / "restart")
    del three_models["continued"]
    others = {"restart": Point(str(tmp_path / "restart")), "again": three_models["mask"]}
    analyse_landscape(file, {"fft": three_models["fft"], **others, "mask": three_models["mask"]}, rows, grid=3)
    record = json.loads(file.read_text())
    assert record["plane"]["models"] == ["fft", "restart", "mask"]
    assert record["lines"]["pairs"] == [["fft", "restart"], ["fft", "mask"], ["restart", "mask"]]
    assert record["surfaces"]["again"] == record["surfaces"]["mask"] != record["surfaces"]["restart"]
    assert record["surfaces"]["restart"]["train"][1][1] == pytest.approx(mean_loss(small(2), make_batches(ROWS, 8)))


def test_a_mask_of_values_other_than_zero_is_refused(three_models, tmp_path):
    file = tmp_path / "mask" / files.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"removed_value": "base"}))
    with pytest.raises(UserError, match="take their values before fine-tuning"):
        analyse_landscape(tmp_path / "a.json", three_models, {"train": ROWS}, grid=3)


def test_what_cannot_be_is_refused_in_one_line(three_models, tmp_path, monkeypatch):
    rows, file = {"train": ROWS}, tmp_path / "a.json"
    with pytest.raises(UserError, match="--grid is 4; give an odd number"):
        analyse_landscape(file, three_models, rows, grid=4)
    with pytest.raises(UserError, match=r"needs about .* GB are free: take a smaller --grid"):
        analyse_landscape(file, three_models, rows, grid=1_000_001)
    monkeypatch.setattr(landscape, "mean_loss", lambda *args: float("nan"))
    with pytest.raises(UserError, match=r"surfaces.fft.train\[0\]\[0\] is nan; nothing was written"):
        analyse_landscape(file, three_models, rows, grid=3)
    assert not file.exists()
    monkeypatch.undo()
    tiny.tiny_llama(num_layers=2).save_pretrained(three_models["continued"].model)
    with pytest.raises(UserError, match="is not of the architecture"):
        analyse_landscape(file, three_models, rows, grid=3)
