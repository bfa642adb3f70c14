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
    """Fig. 13: share removed of each head, mean over Q, K and V; a map per mask.

    Raises:
        NotComputed: If the masks were not analysed, or none covers Q, K and V of a layer.
    """
    masks = _with_heads(evidence)
    maps = {name: _map_of(mask) for name, mask in masks.items()}

    # One scale of colours for masks that remove as much; with a common one, a sparse mask would be all one colour.
    bounds: dict[str, tuple[float, float]] = {}
    for percent, names in _by_sparsity(masks).items():
        low = min(maps[name].min() for name in names)
        high = max(maps[name].max() for name in names)
        bounds[percent] = (low, high)

    def draw(axes: Axes, name: str) -> None:
        mask = masks[name]
        low, high = bounds[_percent(mask)]
        layers = list(_heads(mask))
        _draw_map(axes, maps[name], layers, low, high)

    rows: list[tuple[str, ...]] = []
    for name, mask in masks.items():
        for layer, shares in _heads(mask).items():
            for head, share in enumerate(shares):
                rows.append((name, layer, str(head), number(share)))
    table = Table(("mask", "layer", "head", "share removed"), rows)

    text = (
        "Mean share removed of the parts of Q, K and V that belong to a head; heads that share keys and values count "
        "them each. Maps of masks that remove as much share one scale."
    )
    panels = [Panel(name, partial(draw, name=name)) for name in masks]
    return Chart(text, panels, table)


def _draw_map(
    axes: Axes,
    shares_LH: np.ndarray,
    layers: Sequence[str],
    low: float,
    high: float,
) -> None:
    """Draw a map of layers and heads.

    Args:
        axes: Empty axes.
        shares_LH: Share removed of each head, (layers, heads).
        layers: Names of the layers.
        low: Share at the lower end of the colours.
        high: Share at the upper end.
    """
    image = axes.imshow(shares_LH, aspect="auto", vmin=low, vmax=high)
    bar = axes.figure.colorbar(
        image,
        ax=axes,
        format="%.3f",
        label="share removed",
    )
    bar.outline.set_visible(False)

    step = 1 + len(layers) // 12  # more than a dozen names overlap
    shown = range(0, len(layers), step)
    axes.set_yticks(shown, layers[::step])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)


def mean_heads_chart(evidence: Evidence) -> Chart:
    """Fig. 14: the same, averaged over layers, with the band of chance; a panel for masks that remove as much.

    Raises:
        NotComputed: If the masks were not analysed, or none covers Q, K and V of a layer.
    """
    masks = _with_heads(evidence)
    lines: dict[str, np.ndarray] = {}
    for name, mask in masks.items():
        lines[name] = _map_of(mask).mean(axis=0)
    entries = looks_in_turn(lines)

    def draw(axes: Axes, names: Sequence[str]) -> None:
        shown = {name: lines[name] for name in names}
        means = [line.mean() for line in shown.values()]
        middle = np.mean(means)

        # Masks of one panel remove as much, so the band of the first is that of all.
        spread = _chance(masks[names[0]])
        half_band = 1.96 * spread
        low = middle - half_band
        high = middle + half_band
        axes.axhspan(low, high, color=COLOURS["rule"], zorder=0)
        for name, line in shown.items():
            axes.plot(line, **line_style(entries[name]))

        # At least four deviations, so that noise does not fill the height.
        distances = [np.abs(line - middle).max() for line in shown.values()]
        farthest = max(distances)
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
        panel = Panel(
            title=f"{percent} % removed",
            draw=partial(draw, names=names),
            is_wide=True,
        )
        panels.append(panel)
    band = Entry("95 % of heads at random places", "rule", "", "s")
    return Chart(text, panels, table, [*entries.values(), band])


def _with_heads(evidence: Evidence) -> dict[str, Mapping]:
    """The first learned masks in the order of the verdict, by name and seed; other masks where none is learned."""
    masks = evidence.record("masks")["masks"]  # by the id of a run
    order = [plain_name(name) for name in evidence.masks]
    analysed = [run for run in evidence.runs if run.id in masks]
    learned = [run for run in analysed if run.method == MASK]

    def place(run: TrainedRun) -> int:
        if run.name in order:
            return order.index(run.name)
        return len(order)

    learned.sort(key=place)
    ids = [run.id for run in learned]
    if not ids:
        ids = list(masks)

    names = {run.id: f"{run.name}, seed {run.seed}" for run in evidence.runs}
    found: dict[str, Mapping] = {}
    for run_id in ids[:MAX_MASKS]:
        # A mask of other matrices, such as the MLP's alone, has no heads.
        if _heads(masks[run_id]):
            found[names.get(run_id, run_id)] = masks[run_id]
    if not found:
        raise NotComputed(
            "no mask covers Q, K and V of one layer; mask_target_modules must hold q_proj, k_proj, v_proj"
        )
    return found


def _heads(mask: Mapping) -> dict[str, list[float]]:
    """Layer -> share removed of each head."""
    by_head = mask["by_head"]
    return {layer: found["shares"] for layer, found in by_head.items()}


def _map_of(mask: Mapping) -> np.ndarray:
    """Share removed of each head, (layers, heads)."""
    shares = _heads(mask).values()
    return np.array(list(shares))


def _chance(mask: Mapping) -> float:
    """Standard deviation of a head's share, mean over layers, at random places."""
    deviations = [found["chance"] for found in mask["by_head"].values()]
    # Layers are independent of each other: variances add up, and a mean of n has the deviation of the sum over n.
    variance_of_sum = np.sum(np.square(deviations))
    return float(np.sqrt(variance_of_sum) / len(deviations))


def _percent(mask: Mapping) -> str:
    """How much of its matrices a mask removes, for those that remove as much."""
    percent = 100 * mask["num_removed"] / mask["num_weights"]
    if percent >= 1:
        return f"{percent:.0f}"
    # Below 1 % the first digit tells sparsities apart, which would all be 0.
    return f"{percent:.1g}"


def _by_sparsity(masks: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """Percent removed -> names of the masks that remove as much."""
    groups: dict[str, list[str]] = {}
    for name, mask in masks.items():
        of_percent = groups.setdefault(_percent(mask), [])
        of_percent.append(name)
    return groups
