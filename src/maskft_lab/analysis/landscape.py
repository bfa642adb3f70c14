"""Loss between models (Figs 5 and 12): the plane through three of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskft.loss import mean_nll, nll_per_item
from maskft.models import load_model
from maskft_base.errors import UserError
from maskft_base.files import digest

from .losses import Sampling
from .points import Point, Weights, set_weights, weights_at, weights_of
from .records import is_finished, pieces_of, write_record

Rows = Mapping[str, Sequence[dict]]  # split -> tokenised rows

FFT, CONTINUED, MASK = "fft", "continued", "mask"
MARGIN = 0.25  # the plane goes on beyond its models by this share of their distance


def plane_through(first: Weights, second: Weights, third: Weights) -> tuple[Weights, Weights, np.ndarray]:
    """Orthonormal directions of the plane through three models, with ``first`` as its origin.

    Returns:
        Two directions of length 1 (in all weights together), and the models' coordinates in them, (3, 2).

    Raises:
        UserError: If the three lie on one line: two may be the same model.
    """
    u = {name: second[name] - first[name] for name in first}
    v = {name: third[name] - first[name] for name in first}
    length_u = _dot(u, u) ** 0.5
    u = {name: each / max(length_u, 1e-30) for name, each in u.items()}
    along = _dot(u, v)
    v = {name: each - along * u[name] for name, each in v.items()}
    length_v = _dot(v, v) ** 0.5
    if length_v <= 1e-6 * length_u or length_u <= 1e-6 * length_v:
        raise UserError("three models on one line span no plane: are two of them the same?")
    v = {name: each / length_v for name, each in v.items()}
    return u, v, np.array([[0.0, 0.0], [length_u, 0.0], [along, length_v]])


def analyse_landscape(file: Path, models: Mapping[str, Point], rows: Rows, sampling: Sampling, grid: int = 21) -> None:
    """Write the loss over the plane through three models, in nats per supervised token (``.json``).

    ``plane``: ``x`` and ``y`` (grid,) in L2 distance of weights, ``models`` the three names, ``points`` (3, 2) where
    they lie, and SPLIT (``train``, ``heldout``), (grid, grid), first index x.

    Args:
        file: Where the record goes (``.json``). Points that are done survive a kill.
        models: Three, name -> point; the first is the origin of the plane.
        rows: Split -> tokenised rows.
        sampling: Batch size and device.
        grid: Points of each axis.

    Raises:
        UserError: If the models differ in architecture, or a loss is not finite.
    """
    if grid < 3:
        raise UserError(f"--grid is {grid}; give 3 points of an axis or more")
    settings: dict[str, Any] = {"what": "landscape", "grid": grid, "batch_size": sampling.batch_size}
    settings["models"] = {name: point.digest() for name, point in models.items()}
    settings["rows"] = {split: digest(each) for split, each in rows.items()}
    if is_finished(file, settings):
        return
    names = list(models)
    model = load_model(models[names[0]].model, "float32").to(sampling.device).eval()
    origin = weights_of(model)
    points = [origin, *(weights_at(models[name], origin) for name in names[1:])]

    def measure(x: float, y: float) -> dict[str, float]:
        set_weights(model, origin, [(x, u), (y, v)])
        return {
            split: mean_nll(nll_per_item(model, each, batch_size=sampling.batch_size)) for split, each in rows.items()
        }

    pieces = pieces_of(file, settings)
    u, v, coordinates = plane_through(*points)
    low, high = coordinates.min(0), coordinates.max(0)
    x, y = np.linspace(low - MARGIN * (high - low), high + MARGIN * (high - low), grid).T.tolist()
    found = [
        pieces.get(f"plane {i} {j}", functools.partial(measure, a, b)) for i, a in enumerate(x) for j, b in enumerate(y)
    ]
    plane = {split: np.reshape([each[split] for each in found], (grid, grid)).tolist() for split in rows}
    record = {"plane": {"models": names, "points": coordinates.tolist(), "x": x, "y": y, **plane}}
    write_record(file, record, settings)
    pieces.remove()


def _dot(a: Weights, b: Weights) -> float:
    return sum(float(torch.dot(a[name].flatten().double(), b[name].flatten().double())) for name in a)
