"""Loss around and between models (Figs 5 and 12): surfaces, the plane through three models, straight lines.

A surface is taken along random directions that are filter-normalised (Li et al., https://arxiv.org/abs/1712.09913).
Surfaces of several models can be compared only where they share directions: here one pair, normalised on the weights
after full fine-tuning, serves best FFT, continued FFT, mask, and whatever else is named (a restart, a refit, another
mask). So it also moves weights that a mask has removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch

from maskft.models import load_model
from maskft_base.errors import UserError
from maskft_base.files import digest

from .losses import Batch, check_room, count_parameters, make_batches, mean_loss
from .points import Point, Weights, set_weights, weights_at, weights_of
from .store import Parts, is_finished, write_record

Losses = Mapping[str, list[Batch]]  # split -> batches

FFT, CONTINUED, MASK = "fft", "continued", "mask"
MARGIN = 0.25  # lines and planes go on beyond their models by this share of the distance


def filter_normalised(weights: Weights, seed: int) -> Weights:
    """A random direction whose every filter is as long as the model's.

    Args:
        weights: The model. A filter is a row of a matrix as it is stored, i.e. an output of a linear layer.
        seed: Of the Gaussian draws, which do not depend on the device or on other parameters.

    Returns:
        A direction for each parameter of two or more dimensions; norms and biases are not moved, as in Li et al.
    """
    out = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            continue
        generator = torch.Generator().manual_seed(int(digest([seed, name])[:15], 16))
        draw = torch.randn(weight.shape, generator=generator).to(weight.device)
        scale = weight.float().norm(dim=-1, keepdim=True) / draw.norm(dim=-1, keepdim=True)
        out[name] = (draw * scale).to(weight.dtype)
    return out


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


def surface(
    model,
    center: Weights,
    directions: tuple[Weights, Weights],
    axes: tuple[np.ndarray, np.ndarray],
    losses: Losses,
    parts: Parts,
    name: str,
) -> dict[str, list[list[float]]]:
    """Loss at every point ``center + a x first + b x second``.

    Args:
        model: Holds the architecture; its weights are overwritten.
        center: The point (0, 0).
        directions: Two directions.
        axes: The amounts ``a``, shape (A,), and ``b``, shape (B,).
        losses: Batches of each split.
        parts: Keeps points that are done.
        name: Of the surface, in ``parts``.

    Returns:
        Split -> (A, B), nats per supervised token.
    """

    def at(a: float, b: float) -> dict[str, float]:
        set_weights(model, center, [(a, directions[0]), (b, directions[1])])
        return {split: mean_loss(model, batches) for split, batches in losses.items()}

    points = [
        parts.get(f"{name} {i} {j}", lambda a=float(a), b=float(b): at(a, b))
        for (i, a), (j, b) in product(enumerate(axes[0]), enumerate(axes[1]))
    ]
    shape = (len(axes[0]), len(axes[1]))
    return {split: np.reshape([point[split] for point in points], shape).tolist() for split in losses}


def line(
    model, start: Weights, end: Weights, amounts: np.ndarray, losses: Losses, parts: Parts, name: str
) -> dict[str, list[float]]:
    """Loss on the straight line ``start + t x (end - start)`` for each ``t`` of ``amounts``, (T,): split -> (T,)."""
    way = {key: end[key] - start[key] for key in start}
    found = surface(model, start, (way, {}), (amounts, np.zeros(1)), losses, parts, name)
    return {split: [point[0] for point in points] for split, points in found.items()}


def analyse_landscape(
    file: Path,
    models: Mapping[str, Point],
    rows: Mapping[str, Sequence[dict]],
    *,
    grid: int = 21,
    span: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Surfaces around models, and plane and lines of three: ``fft``, the first that is neither it nor mask, ``mask``.

    Losses are nats per supervised token, SPLIT is ``train`` or ``heldout``. ``axis`` (grid,) is in lengths of the
    filters of ``fft``; ``surfaces`` MODEL SPLIT (grid, grid), first index along the first direction. ``plane``: ``x``
    and ``y`` (grid,) in L2 distance of weights, ``models`` its three, ``points`` (3, 2) where they lie, SPLIT
    (grid, grid), first index x. ``lines``: ``t`` (grid,), 0 the first model and 1 the second; ``pairs`` of names, and
    as many SPLIT (grid,).

    Args:
        file: Where the record goes (``.json``). Points that are done survive a kill.
        models: Name -> point, in order; ``fft``, whose weights give the directions their lengths, ``mask``, and one
            more at least.
        rows: Split -> tokenised rows.
        grid: Points of each axis, odd, so that the middle one is the model itself.
        span: Largest amount along a direction; 1 moves every filter by its own length.
        seed: Of the two directions.
        batch_size: Rows of one forward pass.
        dtype: Of the weights: float32, bfloat16 or float16.
        device: Where to compute.

    Raises:
        UserError: If the models differ in architecture, memory is short, or a loss is not finite.
    """
    if grid < 3 or grid % 2 == 0:
        raise UserError(f"--grid is {grid}; give an odd number of points from 3 on, the middle one is the model")
    if not 0 < span < float("inf"):
        raise UserError(f"--span is {span}; it must be above 0, in lengths of the model's filters")
    settings = {"what": "landscape", "grid": grid, "span": span, "seed": seed, "dtype": dtype}
    settings["models"] = {name: point.digest() for name, point in models.items()}
    settings["rows"] = {split: digest(each) for split, each in rows.items()}
    if is_finished(file, settings):
        return
    num_weights, vocab_size = count_parameters(models[FFT].model)
    weights_bytes = num_weights * getattr(torch, dtype).itemsize
    longest = max(len(row["input_ids"]) for each in rows.values() for row in each)
    # The models, the working copy, two directions and one more on the way; logits four times in float32; each point of
    # the surfaces and two splits as text, dict and number.
    need_bytes = (len(models) + 4) * weights_bytes + 16 * batch_size * longest * vocab_size
    what, remedy = (
        f"a landscape of {grid} x {grid} points",
        "take a smaller --grid or --batch_size, or --dtype bfloat16",
    )
    num_surfaces = len(models) + 1
    check_room(need_bytes + 400 * num_surfaces * grid**2, device, what, remedy)
    model = load_model(models[FFT].model, dtype).to(device).eval()
    fft = weights_of(model)
    points = {name: fft if name == FFT else weights_at(point, fft, dtype) for name, point in models.items()}
    losses = {split: make_batches(each, batch_size, device) for split, each in rows.items()}
    parts = Parts(file, settings, num_surfaces * grid**2 + 3 * grid)
    record = _surfaces(model, points, losses, parts, grid, span, seed)
    three = [FFT, next(name for name in models if name not in (FFT, MASK)), MASK]
    record["plane"] = {"models": three, **_plane(model, [points[name] for name in three], losses, parts, grid)}
    amounts = np.linspace(-MARGIN, 1 + MARGIN, grid)
    pairs = list(combinations(three, 2))
    found = [line(model, points[a], points[b], amounts, losses, parts, f"line {a} {b}") for a, b in pairs]
    by_split = {split: [each[split] for each in found] for split in losses}
    record["lines"] = {"t": amounts.tolist(), "pairs": pairs, **by_split}
    write_record(file, record, settings)
    parts.remove()


def _surfaces(model, points, losses: Losses, parts: Parts, grid: int, span: float, seed: int) -> dict:
    directions = filter_normalised(points[FFT], 2 * seed), filter_normalised(points[FFT], 2 * seed + 1)
    axis = np.linspace(-span, span, grid)
    axis[grid // 2] = 0.0
    axes = (axis, axis)
    found = {
        name: surface(model, point, directions, axes, losses, parts, f"surface {name}")
        for name, point in points.items()
    }
    return {"axis": axis.tolist(), "surfaces": found}


def _plane(model, points: Sequence[Weights], losses: Losses, parts: Parts, grid: int) -> dict:
    u, v, coordinates = plane_through(*points)
    low, high = coordinates.min(0), coordinates.max(0)
    x, y = np.linspace(low - MARGIN * (high - low), high + MARGIN * (high - low), grid).T
    found = surface(model, points[0], (u, v), (x, y), losses, parts, "plane")
    return {"x": x.tolist(), "y": y.tolist(), "points": coordinates.tolist(), **found}


def _dot(a: Weights, b: Weights) -> float:
    return sum(float(torch.dot(a[name].flatten().double(), b[name].flatten().double())) for name in a)
