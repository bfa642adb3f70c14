"""Where masks remove (Figs 13 and 14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..analysis.runs import MASK, TrainedRun, plain_name
from ..results.tables import Table
from .charts import COLOURS, Chart, Entry, Panel, line_style
from .evidence import Evidence, NotComputed
from .methods import looks_in_turn, number

MAX_MASKS = 6  # as many as the paper's Fig. 13


def heads_chart(evidence: Evidence) -> Chart:
    """Fig. 13: share removed of each head, mean over Q, K and V; a map per mask."""
    masks = _with_heads(evidence)
    maps = {name: _map_of(mask) for name, mask in masks.items()}
    bounds: dict[str, tuple[float, float]] = {}
    for percent, names in _by_sparsity(masks).items():
        low = min(maps[name].min() for name in names)
        high = max(maps[name].max() for name in names)
        bounds[percent] = (low, high)

    def draw(axes: Axes, name: str) -> None:
        layers = list(_heads(masks[name]))
        low, high = bounds[_percent(masks[name])]
        image = axes.imshow(maps[name], aspect="auto", vmin=low, vmax=high)
        bar = axes.figure.colorbar(image, ax=axes, format="%.3f", label="share removed")
        bar.outline.set_visible(False)
        step = 1 + len(layers) // 12  # more than a dozen names overlap
        axes.set_yticks(range(0, len(layers), step), layers[::step])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.grid(False)

    rows: list[tuple[str, ...]] = []
    for name, mask in masks.items():
        for layer, shares in _heads(mask).items():
            for head, share in enumerate(shares):
                rows.append((name, layer, str(head), number(share)))
    text = (
        "Mean share removed of the parts of Q, K and V that belong to a head; heads that share keys and values count "
        "them each. Maps of masks that remove as much share one scale."
    )
    panels = [Panel(name, partial(draw, name=name)) for name in masks]
    return Chart(text, panels, Table(("mask", "layer", "head", "share removed"), rows))


def mean_heads_chart(evidence: Evidence) -> Chart:
    """Fig. 14: the same, averaged over layers, with the band of chance; a panel for masks that remove as much."""
    masks = _with_heads(evidence)
    lines = {name: _map_of(mask).mean(axis=0) for name, mask in masks.items()}
    entries = looks_in_turn(lines)

    def draw(axes: Axes, names: Sequence[str]) -> None:
        middle = np.mean([lines[name].mean() for name in names])
        spread = _chance(masks[names[0]])
        half_band = 1.96 * spread
        axes.axhspan(middle - half_band, middle + half_band, color=COLOURS["rule"], zorder=0)
        for name in names:
            axes.plot(lines[name], **line_style(entries[name]))

        # At least four deviations, so that noise does not fill the height.
        farthest = max(np.abs(lines[name] - middle).max() for name in names)
        room = 1.15 * max(farthest, 4 * spread)
        axes.set_ylim(middle - room, middle + room)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("share removed")

    rows: list[tuple[str, ...]] = []
    for name, line in lines.items():
        for head, value in enumerate(line):
            rows.append((name, str(head), number(value)))
    table = Table(("mask", "head", "share removed"), rows)

    text = "Means over layers. In the band lie 95 % of the heads of a mask that removes as much at random places."
    panels: list[Panel] = []
    for percent, names in _by_sparsity(masks).items():
        panels.append(Panel(f"{percent} % removed", partial(draw, names=names), True))
    band = Entry("95 % of heads at random places", "rule", "", "s")
    return Chart(text, panels, table, [*entries.values(), band])


def _with_heads(evidence: Evidence) -> dict[str, Mapping]:
    """The first learned masks in the order of the verdict, by name and seed; other masks where none is learned."""
    masks = evidence.record("masks")["masks"]  # by the id of a run
    order = [plain_name(name) for name in evidence.masks]
    learned = [run for run in evidence.runs if run.method == MASK and run.id in masks]

    def place(run: TrainedRun) -> int:
        return order.index(run.name) if run.name in order else len(order)

    learned.sort(key=place)
    ids = [run.id for run in learned] or list(masks)

    names = {run.id: f"{run.name}, seed {run.seed}" for run in evidence.runs}
    found: dict[str, Mapping] = {}
    for run_id in ids[:MAX_MASKS]:
        if _heads(masks[run_id]):
            found[names.get(run_id, run_id)] = masks[run_id]
    if not found:
        raise NotComputed(
            "no mask covers Q, K and V of one layer; mask_target_modules must hold q_proj, k_proj, v_proj"
        )
    return found


def _heads(mask: Mapping) -> dict[str, list[float]]:
    """Layer -> share removed of each head."""
    return {layer: found["shares"] for layer, found in mask["by_head"].items()}


def _map_of(mask: Mapping) -> np.ndarray:
    """Share removed of each head, (layers, heads)."""
    return np.array(list(_heads(mask).values()))


def _chance(mask: Mapping) -> float:
    """Standard deviation of a head's share, mean over layers, at random places."""
    deviations = [found["chance"] for found in mask["by_head"].values()]
    variance_of_sum = np.sum(np.square(deviations))
    return float(np.sqrt(variance_of_sum) / len(deviations))


def _percent(mask: Mapping) -> str:
    """How much of its matrices a mask removes, for those that remove as much."""
    percent = 100 * mask["num_removed"] / mask["num_weights"]
    return f"{percent:.0f}" if percent >= 1 else f"{percent:.1g}"


def _by_sparsity(masks: Mapping[str, Mapping]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, mask in masks.items():
        groups.setdefault(_percent(mask), []).append(name)
    return groups
