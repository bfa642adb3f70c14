"""Planes through tiny models, against transformers' own loss at weights that are mixed here."""

import json

import numpy as np
import pytest
import torch

import tiny
from maskft.loss import nll_per_item
from maskft.masks.mask_set import MaskSet
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.analysis import landscape
from maskft_lab.analysis.landscape import analyse_landscape, plane_through, set_weights, weights_of
from maskft_lab.analysis.losses import Sampling

ROWS = [{"input_ids": ids, "labels": ids} for ids in tiny.token_ids(4, 7).tolist()]


def small(seed=0):
    return tiny.tiny_llama(num_layers=1, seed=seed)


def vector_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).double()


def loss_at(vector, rows):
    """transformers' own loss of a model with these weights; rows are of one length, so that it is the mean."""
    model = small()
    start = 0
    for parameter in model.parameters():
        parameter.data = vector[start : start + parameter.numel()].view_as(parameter).float()
        start += parameter.numel()
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def point_of_plane(vectors, coordinates, x, y):
    """The weights at (x, y): the three models' coordinates tell how much of each, whatever the axes are."""
    origin, first, second = vectors
    share_first, share_second = np.linalg.solve(np.transpose(coordinates[1:] - coordinates[0]), [x, y])
    return origin + share_first * (first - origin) + share_second * (second - origin)


def test_the_axes_keep_distances():
    models = [small(seed) for seed in range(3)]
    points = [weights_of(model) for model in models]
    u, v, coordinates = plane_through(*points)
    vectors = [vector_of(model) for model in models]
    for i in range(3):
        for j in range(3):
            distance = float((vectors[i] - vectors[j]).norm())
            assert np.linalg.norm(coordinates[i] - coordinates[j]) == pytest.approx(distance, rel=1e-5, abs=1e-6)
    flat_u = torch.cat([each.flatten() for each in u.values()]).double()
    flat_v = torch.cat([each.flatten() for each in v.values()]).double()
    assert [float(flat_u.norm()), float(flat_v.norm())] == pytest.approx([1, 1], rel=1e-5)
    assert float(flat_u @ flat_v) == pytest.approx(0, abs=1e-6)
    assert coordinates[0].tolist() == [0, 0] and coordinates[1, 1] == 0


def test_three_models_on_a_line_span_no_plane():
    points = [weights_of(small(seed)) for seed in range(2)]
    middle = {name: (points[0][name] + points[1][name]) / 2 for name in points[0]}
    for three in ((points[0], points[0], points[1]), (points[0], points[1], points[0]), (*points, middle)):
        with pytest.raises(UserError, match="span no plane"):
            plane_through(*three)


def test_setting_weights_adds_directions_and_keeps_negative_zeros():
    model = small()
    center = {name: torch.full_like(parameter, -0.0) for name, parameter in model.named_parameters()}
    ones = {name: torch.ones_like(each) for name, each in center.items()}
    set_weights(model, center, [(0.0, ones), (0.0, ones)])
    assert all(bool(parameter.signbit().all()) for parameter in model.parameters())
    set_weights(model, center, [(0.5, ones), (0.25, ones)])
    assert all(bool((parameter == 0.75).all()) for parameter in model.parameters())


@pytest.fixture
def three_models(tmp_path):
    for name, seed in (("fft", 0), ("continued", 1)):
        small(seed).save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(48, 32, generator=generator) > 0.1
    tiny.save_masks({"model.layers.0.mlp.up_proj": mask}, tmp_path / "mask")
    return [str(tmp_path / name) for name in ("fft", "continued", "mask")]


def test_losses_of_the_plane_are_those_of_transformers(three_models, tmp_path):
    adapter = three_models[2]
    masked = small(0)
    MaskSet.from_adapter(adapter).apply_(masked)
    vectors = [vector_of(model) for model in (small(0), small(1), masked)]

    rows = {"train": ROWS, "heldout": ROWS[:2]}
    analyse_landscape(tmp_path / "a.json", three_models, rows, Sampling(batch_size=3), grid=3)
    plane = json.loads((tmp_path / "a.json").read_text())["plane"]

    # The margin: the axes begin a quarter of their length before the lowest model, and end as far after the highest.
    coordinates = np.array(plane["points"])
    for axis, values in (("x", coordinates[:, 0]), ("y", coordinates[:, 1])):
        low, high = values.min(), values.max()
        expected = [low - 0.25 * (high - low), (low + high) / 2, high + 0.25 * (high - low)]
        assert plane[axis] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for split, split_rows in rows.items():
        for i, x in enumerate(plane["x"]):
            for j, y in enumerate(plane["y"]):
                expected = loss_at(point_of_plane(vectors, coordinates, x, y), split_rows)
                assert plane[split][i][j] == pytest.approx(expected, rel=1e-4), (split, i, j)
        for vector, (x, y) in zip(vectors, coordinates, strict=True):
            at_model = point_of_plane(vectors, coordinates, x, y)
            torch.testing.assert_close(at_model, vector, rtol=1e-5, atol=1e-7)


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
    # At the first point: the others may take hours.
    measured = []
    monkeypatch.setattr(landscape, "nll_per_item", lambda *args, **kwargs: measured.append(1))
    with pytest.raises(UserError, match=r"the loss of train rows is nan at x \S+, y \S+ of the plane: check that"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=3)
    assert len(measured) == 1 and not file.exists()
    monkeypatch.undo()
    # Of the weights, before the losses of a plane are computed.
    broken = small(5)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(three_models[1])
    with pytest.raises(UserError, match="a model has weights that are NaN or infinite"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=3)
    tiny.tiny_llama(num_layers=2).save_pretrained(three_models[1])
    with pytest.raises(UserError, match="is not of the architecture"):
        analyse_landscape(file, three_models, rows, Sampling(), grid=3)
