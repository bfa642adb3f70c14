"""Loss around and between models (Figs 5 and 12): surfaces, the plane through three models, straight lines.

A surface is taken along random directions that are filter-normalised (Li et al., https://arxiv.org/abs/1712.09913).
Surfaces of several models can be compared only where they share directions: here one pair, normalised on the weights
after full fine-tuning, serves best FFT, continued FFT and mask. So it also moves weights that a mask has removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapter.mask_set import MaskSet
from ..errors import UserError
from ..files import digest
from ..models import load_model
from .losses import Batch, check_room, count_parameters, make_batches, mean_loss
from .store import Parts, digest_folder, is_finished, write_record

Weights = dict[str, Tensor]  # parameter name -> values, on the model's device and in its dtype
Losses = Mapping[str, list[Batch]]  # split -> batches

MODELS = ("fft", "continued", "mask")
MARGIN = 0.25  # lines and planes go on beyond their models by this share of the distance


def weights_of(model) -> Weights:
    """A copy of all parameters; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def set_weights(model, center: Weights, steps: Sequence[tuple[float, Weights]] = ()) -> None:
    """Set parameters to ``center`` plus the sum of amount x direction; a parameter without a direction stays.

    The same amounts give the same bits, in whatever order points are visited; amounts of 0 give ``center``.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(center[name])
        for amount, direction in steps:
            if amount != 0 and name in direction:
                parameter.add_(direction[name], alpha=amount)


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
    models: Mapping[str, str],
    rows: Mapping[str, Sequence[dict]],
    *,
    grid: int = 21,
    span: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Surfaces, plane and lines of best FFT, continued FFT and mask.

    Losses are nats per supervised token, SPLIT is ``train`` or ``heldout``. ``axis`` (grid,) is in lengths of the
    model's filters; ``surfaces`` MODEL SPLIT (grid, grid), first index along the first direction. ``plane``: ``x`` and
    ``y`` (grid,) in L2 distance of weights, ``points`` (3, 2) of fft, continued and mask, SPLIT (grid, grid), first
    index x. ``lines``: ``t`` (grid,), 0 the first model and 1 the second; FIRST-SECOND SPLIT (grid,).

    Args:
        file: Where the record goes (``.json``). Points that are done survive a kill.
        models: ``fft`` and ``continued``: folders of models; ``mask``: adapter folder over ``fft``.
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
    settings["models"] = {name: digest_folder(folder) for name, folder in models.items()}
    settings["rows"] = {split: digest(each) for split, each in rows.items()}
    if is_finished(file, settings):
        return
    num_weights, vocab_size = count_parameters(models["fft"])
    longest = max(len(row["input_ids"]) for each in rows.values() for row in each)
    # Three models, the working copy, two directions and one more on the way; logits four times in float32; each point
    # of four surfaces and two splits as text, dict and number.
    need_bytes = 7 * num_weights * getattr(torch, dtype).itemsize + 16 * batch_size * longest * vocab_size
    what, remedy = (
        f"a landscape of {grid} x {grid} points",
        "take a smaller --grid or --batch_size, or --dtype bfloat16",
    )
    check_room(need_bytes + 1600 * grid**2, device, what, remedy)
    model = load_model(models["fft"], dtype).to(device).eval()
    points = _three_models(model, models, dtype)
    losses = {split: make_batches(each, batch_size, device) for split, each in rows.items()}
    parts = Parts(file, settings, 4 * grid**2 + 3 * grid)
    record = _surfaces(model, points, losses, parts, grid, span, seed)
    record["plane"] = _plane(model, points, losses, parts, grid)
    amounts = np.linspace(-MARGIN, 1 + MARGIN, grid)
    record["lines"] = {"t": amounts.tolist()}
    for a, b in combinations(MODELS, 2):
        record["lines"][f"{a}-{b}"] = line(model, points[a], points[b], amounts, losses, parts, f"line {a} {b}")
    write_record(file, record, settings)
    parts.remove()


def _three_models(model, models: Mapping[str, str], dtype: str) -> dict[str, Weights]:
    fft, device = weights_of(model), model.device
    MaskSet.from_adapter(models["mask"]).apply_(model)
    mask = weights_of(model)
    continued = weights_of(load_model(models["continued"], dtype).to(device))
    if {n: w.shape for n, w in continued.items()} != {n: w.shape for n, w in fft.items()}:
        raise UserError(f"{models['continued']!r} and {models['fft']!r} are not of one architecture")
    return {"fft": fft, "continued": continued, "mask": mask}


def _surfaces(model, points, losses: Losses, parts: Parts, grid: int, span: float, seed: int) -> dict:
    directions = filter_normalised(points["fft"], 2 * seed), filter_normalised(points["fft"], 2 * seed + 1)
    axis = np.linspace(-span, span, grid)
    axis[grid // 2] = 0.0
    axes = (axis, axis)
    found = {name: surface(model, points[name], directions, axes, losses, parts, f"surface {name}") for name in MODELS}
    return {"axis": axis.tolist(), "surfaces": found}


def _plane(model, points, losses: Losses, parts: Parts, grid: int) -> dict:
    u, v, coordinates = plane_through(*(points[name] for name in MODELS))
    low, high = coordinates.min(0), coordinates.max(0)
    x, y = np.linspace(low - MARGIN * (high - low), high + MARGIN * (high - low), grid).T
    found = surface(model, points["fft"], (u, v), (x, y), losses, parts, "plane")
    return {"x": x.tolist(), "y": y.tolist(), "points": coordinates.tolist(), **found}


def _dot(a: Weights, b: Weights) -> float:
    return sum(float(torch.dot(a[name].flatten().double(), b[name].flatten().double())) for name in a)
