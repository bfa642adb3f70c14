"""Loss between models (Figs 5 and 12): the plane through three of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskft.loss import mean_nll, nll_per_item
from maskft.models import load_model
from maskft_common.errors import UserError
from maskft_common.files import digest

from ..evaluation.load_models import weights_of
from .losses import Sampling, check_ids
from .masks import masks_of
from .records import Report, digest_folder, is_finished, no_report, pieces_of, write_record

Rows = Mapping[str, Sequence[dict]]  # split -> tokenised rows
Weights = dict[str, Tensor]  # parameter name -> values, on the model's device and in its dtype

MARGIN = 0.25  # the plane extends beyond its models by this share of their distance


def plane_through(
    first: Weights,
    second: Weights,
    third: Weights,
) -> tuple[Weights, Weights, np.ndarray]:
    """Orthonormal directions of the plane through three models, with ``first`` as its origin.

    Returns:
        Two directions of length 1 (in all weights together), and the models' coordinates in them, (3, 2).

    Raises:
        UserError: If the three lie on one line: two may be the same model. If a weight is not finite.
    """
    # From the origin to the other two.
    u: Weights = {}
    v: Weights = {}
    for name, origin in first.items():
        u[name] = second[name] - origin
        v[name] = third[name] - origin

    # Gram-Schmidt: u has length 1; v loses its part along u, then has length 1 too.
    length_u = _dot(u, u) ** 0.5
    divisor = max(length_u, 1e-30)  # keeps u finite if first and second are equal, which is reported below
    for name in u:
        u[name] = u[name] / divisor
    # The coordinate of the third model along u, before this part is removed.
    along = _dot(u, v)
    for name in v:
        v[name] = v[name] - along * u[name]
    length_v = _dot(v, v) ** 0.5

    # NaN or infinite weights: all points of the plane would be NaN.
    if not math.isfinite(length_u + length_v):
        raise UserError("a model has weights that are NaN or infinite, and spans no plane: train it again")
    # A length that is so small beside the other is rounding error of float32 weights.
    if length_v <= 1e-6 * length_u or length_u <= 1e-6 * length_v:
        raise UserError("three models on one line span no plane: are two of them the same?")
    for name in v:
        v[name] = v[name] / length_v

    # The first is the origin, the second lies on the axis of u, the third has a part along each.
    coordinates = [
        [0.0, 0.0],
        [length_u, 0.0],
        [along, length_v],
    ]
    return u, v, np.array(coordinates)


@torch.no_grad()
def set_weights(
    model,
    center: Weights,
    steps: Sequence[tuple[float, Weights]],
) -> None:
    """Set parameters to ``center`` plus the sum of amount x direction.

    The same amounts give the same bits, in whatever order points are visited; amounts of 0 give ``center``.
    """
    for name, parameter in model.named_parameters():
        # From the centre each time, and not from the point before: sums of steps there and back would round.
        parameter.copy_(center[name])
        for amount, direction in steps:
            # Adding 0 would make +0.0 of -0.0.
            if amount != 0:
                parameter.add_(direction[name], alpha=amount)


def analyse_landscape(
    file: Path,
    models: Sequence[str],
    rows: Rows,
    sampling: Sampling,
    grid: int = 21,
    report: Report = no_report,
) -> None:
    """Write the loss over the plane through three models, in nats per supervised token (``.json``).

    ``plane``: ``x`` and ``y`` (grid,) in L2 distance of weights, ``points`` (3, 2), the coordinates of the models, and
    SPLIT (``train``, ``heldout``), (grid, grid), first index x.

    Args:
        file: Where the record goes (``.json``). Points that are done survive a kill.
        models: Folders of the best of full fine-tuning, which is the origin of the plane, of its end, and of a mask
            over the best.
        rows: Split -> tokenised rows.
        sampling: Batch size and device.
        grid: Points of each axis.
        report: Called after each point.

    Raises:
        UserError: If the models differ in architecture, rows are of another tokenizer, or a weight or a loss is not
            finite.
    """
    check_grid(grid)
    # The rows themselves would make the record as large as the data.
    rows_digests: dict[str, str] = {}
    for split, rows_of_split in rows.items():
        rows_digests[split] = digest(rows_of_split)
    settings: dict[str, Any] = {
        "what": "plane",
        "grid": grid,
        "batch_size": sampling.batch_size,
        "models": [digest_folder(model) for model in models],
        "rows": rows_digests,
    }
    if is_finished(file, settings):
        return

    # The plane through the three models.
    best, end, adapter = models
    # Read first: an adapter that this analysis refuses should not cost the load of two models.
    masks = masks_of(adapter)
    # In float32, because small steps would be lost in bfloat16 weights.
    model = load_model(best, "float32")
    model = model.to(sampling.device).eval()
    for rows_of_split in rows.values():
        check_ids(rows_of_split, model)
    origin = weights_of(model)
    # Unnamed, like the masked weights below: a name would keep the second model in memory to the end.
    continued = weights_of(load_model(end, "float32").to(sampling.device))
    # Before the difference of their weights, which would end in an error of torch, or broadcast.
    if _shapes(origin) != _shapes(continued):
        raise UserError(f"{end!r} is not of the architecture of the model under the mask")
    # The third model is the first with its masked weights at 0. From here on ``model`` only holds points of the plane.
    masks.apply_(model)
    u, v, coordinates = plane_through(origin, continued, weights_of(model))

    def losses_at(
        x: float,
        y: float,
    ) -> dict[str, float]:
        """Mean loss of each split at a point of the plane."""
        steps = [(x, u), (y, v)]
        set_weights(model, origin, steps)
        losses: dict[str, float] = {}
        for split, rows_of_split in rows.items():
            # Per supervised token over all rows, as training reports held-out losses.
            nll = nll_per_item(model, rows_of_split, batch_size=sampling.batch_size)
            loss = mean_nll(nll)
            # Now, as no file can hold it: the other points may take hours.
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of {split} rows is {loss} at x {x:g}, y {y:g} of the plane: check that the models' "
                    "losses are finite"
                )
            losses[split] = loss
        return losses

    # The losses, each point kept as soon as it is measured.
    x, y = _axes(coordinates, grid)
    pieces = pieces_of(file, settings)
    found: list[dict[str, float]] = []
    for i, x_i in enumerate(x):
        for j, y_j in enumerate(y):
            compute = partial(losses_at, x_i, y_j)
            losses_of_point = pieces.get(f"plane {i} {j}", compute)
            found.append(losses_of_point)
            report(len(found), grid**2)

    # Points were visited with y in the inner loop: as a matrix, the first index is x.
    plane: dict[str, Any] = {
        "points": coordinates.tolist(),
        "x": x,
        "y": y,
    }
    for split in rows:
        losses = [losses_of_point[split] for losses_of_point in found]
        losses_XY = np.reshape(losses, (grid, grid))
        plane[split] = losses_XY.tolist()
    write_record(file, {"plane": plane}, settings)
    pieces.remove()


def check_grid(grid: int) -> None:
    """Raise if a grid has too few points."""
    if grid < 3:
        raise UserError(f"--grid is {grid}; give 3 points of an axis or more")


def _axes(
    coordinates: np.ndarray,
    grid: int,
) -> tuple[list[float], list[float]]:
    """Both coordinates of a grid's points: the models, with coordinates (3, 2), and a margin around them."""
    low = coordinates.min(0)
    high = coordinates.max(0)
    # For each axis its own, (2,).
    margin = MARGIN * (high - low)
    start = low - margin
    stop = high + margin
    points = np.linspace(start, stop, grid)  # (grid, 2): both axes at once
    x, y = points.T.tolist()
    return x, y


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _dot(a: Weights, b: Weights) -> float:
    """Inner product over all weights, in float64: float32 sums of millions of products lose digits."""
    # Matrix by matrix, because a flat copy of all weights would double the memory.
    total = 0.0
    for name in a:
        own = a[name].flatten().double()
        other = b[name].flatten().double()
        total += float(torch.dot(own, other))
    return total
