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
        NotComputed: If the study's masks were not analysed, or none covers Q, K and V of a layer.
    """
    masks = _with_heads(evidence)
    maps = {name: _map_of(mask) for name, mask in masks.items()}

    # Masks that remove the same percentage share a scale of colours. On one scale for all, a mask that removes little
    # would have one colour.
    bounds = {}  # percent removed -> lowest and highest share
    for percent, names in _by_sparsity(masks).items():
        lows = [maps[name].min() for name in names]
        highs = [maps[name].max() for name in names]
        bounds[percent] = (min(lows), max(highs))

    def draw(axes: Axes, name: str) -> None:
        mask = masks[name]
        low, high = bounds[_percent(mask)]
        # As in the file: in the order of the model's layers.
        layers = list(_heads(mask))
        _draw_map(axes, maps[name], layers, low, high)

    rows = []
    for name, mask in masks.items():
        for layer, shares in _heads(mask).items():
            for head, share in enumerate(shares):
                row = (name, layer, str(head), number(share))
                rows.append(row)
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
    # The colours end at the same shares in every map of a group, so that they can be compared.
    image = axes.imshow(shares_LH, aspect="auto", vmin=low, vmax=high)
    bar = axes.figure.colorbar(
        image,
        ax=axes,
        format="%.3f",
        label="share removed",
    )
    bar.outline.set_visible(False)

    # More than a dozen names overlap.
    step = 1 + len(layers) // 12
    shown = range(0, len(layers), step)
    axes.set_yticks(shown, layers[::step])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)


def mean_heads_chart(evidence: Evidence) -> Chart:
    """Fig. 14: the same, averaged over layers, with the band of chance; a panel for masks that remove as much.

    Raises:
        NotComputed: If the study's masks were not analysed, or none covers Q, K and V of a layer.
    """
    masks = _with_heads(evidence)
    lines = {}
    for name, mask in masks.items():
        lines[name] = _map_of(mask).mean(axis=0)
    # The same look for a mask in every panel, so one legend serves all.
    entries = looks_in_turn(lines)

    def draw(axes: Axes, names: Sequence[str]) -> None:
        means = [lines[name].mean() for name in names]
        # The mean share of all heads, which at random places every head would have on average.
        middle = np.mean(means)

        # The band of chance. Masks of one panel remove as much, so the band of the first is that of all.
        spread = _chance(masks[names[0]])
        # For each head by itself: of many heads one in twenty lies outside by chance alone.
        half_band = 1.96 * spread  # 95 % of a normal distribution
        axes.axhspan(
            middle - half_band,
            middle + half_band,
            color=COLOURS["rule"],
            zorder=0,
        )

        distances = []
        for name in names:
            line = lines[name]
            axes.plot(line, **line_style(entries[name]))
            distance = np.abs(line - middle)
            distances.append(distance.max())

        # At least four deviations: without a lower limit, noise would fill the height and look like a pattern.
        farthest = max(distances)
        room = 1.15 * max(farthest, 4 * spread)
        axes.set_ylim(middle - room, middle + room)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("share removed")

    rows = []
    for name, line in lines.items():
        for head, value in enumerate(line):
            row = (name, str(head), number(value))
            rows.append(row)
    table = Table(("mask", "head", "share removed"), rows)

    # A panel for each sparsity: the shares of masks that remove more are higher, and have another band.
    text = "Means over layers. In the band lie 95 % of the heads of a mask that removes as much at random places."
    panels = []
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
    """The first learned masks in the order of the verdict, by name and seed; other masks if none is learned."""
    masks = evidence.record("masks")["masks"]  # by the id of a run
    # Without those of runs that the study had before its recipe was changed.
    analysed = [run for run in evidence.runs if run.id in masks]
    if not analysed:
        raise NotComputed("the masks that were analysed are not among this study's runs")
    learned = [run for run in analysed if run.method == MASK]

    # Masks of the verdict first, all others after them in the order of the runs.
    order = [plain_name(name) for name in evidence.masks]

    def place(run: TrainedRun) -> int:
        if run.name in order:
            return order.index(run.name)
        return len(order)

    learned.sort(key=place)
    # A study may have fixed masks alone.
    ids = [run.id for run in learned]
    if not ids:
        ids = [run.id for run in analysed]

    # Seeds of one method have one name, and each has its own mask.
    names = {run.id: f"{run.name}, seed {run.seed}" for run in evidence.runs}
    found = {}
    for run_id in ids:
        mask = masks[run_id]
        # A mask of other matrices, such as the MLP's alone, has no heads.
        if _heads(mask) and len(found) < MAX_MASKS:
            name = names.get(run_id, run_id)
            found[name] = mask
    if not found:
        raise NotComputed(
            "no mask covers Q, K and V of one layer; mask_target_modules must hold q_proj, k_proj, v_proj"
        )
    return found


def _heads(mask: Mapping) -> dict[str, list[float]]:
    """Layer -> share removed of each head."""
    shares = {}
    for layer, found in mask["by_head"].items():
        shares[layer] = found["shares"]
    return shares


def _map_of(mask: Mapping) -> np.ndarray:
    """Share removed of each head, (layers, heads)."""
    shares = _heads(mask).values()
    return np.array(list(shares))


def _chance(mask: Mapping) -> float:
    """Standard deviation of a head's share, mean over layers, at random places."""
    layers = mask["by_head"].values()
    deviations = [found["chance"] for found in layers]

    # Layers are independent of each other, so their variances add up. A mean over n layers has the deviation of their
    # sum, divided by n.
    variance_of_sum = np.sum(np.square(deviations))
    deviation_of_mean = np.sqrt(variance_of_sum) / len(deviations)
    return float(deviation_of_mean)


def _percent(mask: Mapping) -> str:
    """How much of its matrices a mask removes, rounded: masks with the same text are drawn together."""
    percent = 100 * mask["num_removed"] / mask["num_weights"]
    if percent >= 1:
        return f"{percent:.0f}"
    # Rounded to a whole number, all sparsities below 0.5 % would be 0.
    return f"{percent:.1g}"


def _by_sparsity(masks: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """Percent removed -> names of the masks that remove as much."""
    groups = {}
    for name, mask in masks.items():
        of_percent = groups.setdefault(_percent(mask), [])
        of_percent.append(name)
    return groups
