"""Where masks remove (Figs 13 and 14), how alike they are, and what removing each part does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..results.text import Table
from .charts import COLOURS, SERIES, Chart, Entry, Panel, plain
from .methods import number

MAX_MAPS = 6  # as many as the paper's Fig. 13
SAME = 0.01  # shares of matrices that differ by less, relatively, are rounding
MAX_PAIRS = 24  # of methods whose masks are compared
_SEED = re.compile(r", seed \d+$")
_MARKERS = "o^sDvP"


def mask_charts(record: Mapping, learned: Sequence[str]) -> list[Chart]:
    """Every chart that the record has numbers for; ``learned`` names the learned masks, the first of them first."""
    masks = record["masks"]
    order = [name for name in learned if name in masks] or list(masks)
    chosen = {name: masks[name] for name in order[:MAX_MAPS]}
    with_heads = {name: each for name, each in chosen.items() if any("qkv" in h for h in each["by_head"].values())}
    charts = []
    if with_heads:
        charts += [heads_chart(with_heads), mean_heads_chart(with_heads)]
    by_module = {name: each["by_module"] for name, each in chosen.items()}
    if any(max(shares.values()) - min(shares.values()) >= SAME * max(shares.values()) for shares in by_module.values()):
        charts.append(modules_chart(by_module))  # not of one top-k per matrix, which makes all shares equal
    charts.append(magnitudes_chart(chosen))
    if record["agreement"]:
        charts.append(agreement_chart(record["agreement"], learned))
    if any(each["flips_per_step"] for each in chosen.values()):
        charts.append(flips_chart(chosen))
    with_effects = {name: each for name, each in chosen.items() if each["effects"]}
    if with_effects:
        charts.append(effects_chart(with_effects))
    return charts


def heads_chart(masks: Mapping[str, Mapping]) -> Chart:
    """Fig. 13: share removed of each head, mean over Q, K and V; a map per mask."""
    bounds = {}
    for percent, members in _by_sparsity(masks).items():
        values = [value for each in members.values() for layer in _heads(each).values() for value in layer]
        bounds[percent] = min(values), max(values)

    def draw(axes: Axes, mask: Mapping) -> None:
        heads, (low, high) = _heads(mask), bounds[_percent(mask)]
        image = axes.imshow(np.array(list(heads.values())), aspect="auto", vmin=low, vmax=high)
        axes.figure.colorbar(image, ax=axes, format="%.3f").outline.set_visible(False)
        axes.set_yticks(range(len(heads)), list(heads))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.grid(False)

    rows = [
        (name, layer, str(head), number(share))
        for name, mask in masks.items()
        for layer, shares in _heads(mask).items()
        for head, share in enumerate(shares)
    ]
    text = (
        "Mean share removed of the parts of Q, K and V that belong to a head; heads that share keys and values count "
        "them each. Maps of masks that remove as much share one scale."
    )
    panels = [Panel(name, lambda axes, mask=mask: draw(axes, mask)) for name, mask in masks.items()]
    table = Table(("mask", "layer", "head", "share removed"), rows)
    return Chart("fig13_heads", "Share removed by attention head", text, panels, table, (13,))


def mean_heads_chart(masks: Mapping[str, Mapping]) -> Chart:
    """Fig. 14: the same, averaged over layers, a line per mask; a panel for those that remove as much."""
    lines = {name: np.mean(list(_heads(mask).values()), axis=0).tolist() for name, mask in masks.items()}
    entries = dict(zip(lines, _entries(lines), strict=True))

    def draw(axes: Axes, names: Sequence[str]) -> None:
        for name in names:
            entry = entries[name]
            axes.plot(lines[name], color=COLOURS[entry.colour], linestyle=entry.dash, marker=entry.marker)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
        axes.set_ylabel("share removed")

    rows = [(name, str(head), number(value)) for name, values in lines.items() for head, value in enumerate(values)]
    text = (
        "Means over layers. Lines that run together are heads that all masks thin alike. Whether that is more than "
        "chance is told by the agreement of the masks, not by the eye."
    )
    table = Table(("mask", "head", "share removed"), rows)
    panels = [
        Panel(f"{percent} % removed", lambda axes, names=list(members): draw(axes, names), True)
        for percent, members in _by_sparsity(masks).items()
    ]
    title = "Share removed by head, over layers"
    return Chart("fig14_heads_mean", title, text, panels, table, (14,), list(entries.values()))


def modules_chart(by_module: Mapping[str, Mapping[str, float]]) -> Chart:
    """Share removed of every masked matrix, layers down, kinds across; a map per mask."""
    values = [share for shares in by_module.values() for share in shares.values()]
    low, high = min(values), max(values)

    def draw(axes: Axes, shares: Mapping[str, float]) -> None:
        layers, kinds, grid = module_grid(shares)
        axes.imshow(grid, aspect="auto", vmin=low, vmax=high)
        is_small = len(layers) * len(kinds) <= 64
        for (row, column), share in np.ndenumerate(grid):
            if is_small and np.isfinite(share):
                dark = (share - low) / (high - low or 1) < 0.6
                axes.text(
                    column, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=6,
                    color="#ffffff" if dark else "#000000",
                )  # fmt: skip
        axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylabel("layer")
        axes.grid(False)

    rows = [(name, module, number(share)) for name, shares in by_module.items() for module, share in shares.items()]
    panels = [Panel(name, lambda axes, each=each: draw(axes, each)) for name, each in by_module.items()]
    text = "Percent of the weights of each matrix that is removed."
    table = Table(("mask", "matrix", "share removed"), rows)
    return Chart("masks_modules", "Share removed by matrix", text, panels, table)


def magnitudes_chart(masks: Mapping[str, Mapping]) -> Chart:
    """Share removed of each tenth of the weights by magnitude, mean over matrices."""
    lines = {name: np.mean(list(mask["by_magnitude_decile"].values()), axis=0).tolist() for name, mask in masks.items()}
    entries = _entries(lines)

    def draw(axes: Axes) -> None:
        for entry, values in zip(entries, lines.values(), strict=True):
            axes.plot(range(1, 11), values, color=COLOURS[entry.colour], linestyle=entry.dash, marker=entry.marker)
        axes.set_xticks(range(1, 11))
        axes.set_xlabel("tenth of a matrix's weights by magnitude, smallest first")
        axes.set_ylabel("share removed")
        axes.set_ylim(bottom=0)

    rows = [(name, str(n), number(value)) for name, values in lines.items() for n, value in enumerate(values, 1)]
    text = "A mask that does not look at magnitude is a flat line; one that removes the smallest falls to the right."
    table = Table(("mask", "tenth", "share removed"), rows)
    panels = [Panel("Mean over matrices", draw, True)]
    return Chart("masks_magnitude", "Share removed by magnitude", text, panels, table, (), entries)


def agreement_chart(pairs: Sequence[Mapping], learned: Sequence[str]) -> Chart:
    """What two masks remove in common against what chance gives: lines are pairs of methods, marks pairs of masks."""
    order = list(dict.fromkeys(_SEED.sub("", name) for name in learned))
    groups: dict[tuple[str, ...], list[Mapping]] = {}
    for pair in pairs:
        if pair["expected"]:  # else one of them removes nothing, and there is nothing to agree on
            methods = dict.fromkeys(_SEED.sub("", pair[side]) for side in ("first", "second"))
            groups.setdefault(tuple(methods), []).append(pair)

    def place(methods: tuple[str, ...]) -> tuple:
        """Seeds of one method first, learned masks before others, these in the order of the verdict."""
        places = [order.index(name) if name in order else len(order) for name in methods]
        return len(methods), places.count(len(order)), places

    shown = sorted(groups, key=place)[:MAX_PAIRS]

    def draw(axes: Axes) -> None:
        for row, methods in enumerate(shown):
            for pair in groups[methods]:
                marker, colour = ("o", "red") if pair["same_start"] else ("s", "blue")
                ratio = pair["num_common"] / pair["expected"]
                axes.plot(ratio, row, marker, color=COLOURS[colour], markerfacecolor="none")
        axes.axvline(1, color=COLOURS["ink"], linewidth=0.8)
        names = [f"{' / '.join(methods)} ({len(groups[methods])})" for methods in shown]
        axes.set_yticks(range(len(shown)), list(map(plain, names)), fontsize=6.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("removed by both, as a multiple of chance")
        axes.grid(False, axis="y")

    rows = [
        (
            pair["first"],
            pair["second"],
            "yes" if pair["same_start"] else "no",
            str(pair["num_common"]),
            number(pair["expected"]),
            number(pair["z_score"]),
            number(pair["jaccard"]),
            number(pair["jaccard_expected"]),
        )
        for methods in shown
        for pair in groups[methods]
    ]
    columns = ("first", "second", "same start", "in common", "by chance", "z", "Jaccard", "Jaccard by chance")
    text = (
        "A mark is what two masks both remove, divided by what two masks of these counts have in common by chance (the "
        "line at 1). Above it both depend on something that they share: the data, the weights' magnitude, or an equal "
        "start of the scores. In brackets the number of pairs"
    )
    left_out = len(groups) - len(shown)
    text += f"; {left_out} more pairs of methods are in masks.json." if left_out else "."
    entries = [
        Entry("two masks over one model", "red", "", "o"),
        Entry("over different models", "blue", "", "s"),
    ]
    panels = [Panel("Agreement", draw, True, 0.8 + 0.17 * len(shown))]
    return Chart(
        "masks_agreement", "Agreement of masks against chance", text, panels, Table(columns, rows), (), entries
    )


def flips_chart(masks: Mapping[str, Mapping]) -> Chart:
    """Entries that change their place per optimizer step, as a share of the mask."""
    lines = {name: mask for name, mask in masks.items() if mask["flips_per_step"]}
    entries = _entries(lines)

    def draw(axes: Axes) -> None:
        for entry, mask in zip(entries, lines.values(), strict=True):
            steps, flips = np.transpose(mask["flips_per_step"])
            axes.plot(steps, flips / mask["num_weights"], color=COLOURS[entry.colour], linestyle=entry.dash)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("share of entries that flips")
        axes.set_ylim(bottom=0)

    rows = [(name, str(step), number(flips)) for name, mask in lines.items() for step, flips in mask["flips_per_step"]]
    text = "Entries that were kept and are removed now, or the other way round, per step. A mask that settles nears 0."
    panels = [Panel("Flips per step", draw, True)]
    table = Table(("mask", "step", "flips"), rows)
    return Chart("masks_flips", "Flips during training", text, panels, table, (), entries)


def effects_chart(masks: Mapping[str, Mapping]) -> Chart:
    """Predicted against measured change of the loss when one matrix's removed weights become 0."""

    def draw(axes: Axes, effects: Mapping) -> None:
        predicted, measured = zip(*((e["predicted"], e["measured"]) for e in effects["modules"].values()), strict=True)
        axes.plot(predicted, measured, "o", color=COLOURS["red"], markersize=3.5, alpha=0.7)
        ends = min(*predicted, *measured), max(*predicted, *measured)
        axes.plot(ends, ends, color=COLOURS["muted"], linewidth=0.7, linestyle="--")
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("predicted (nats/token)")
        axes.set_ylabel("measured (nats/token)")
        lines = [] if effects["correlation"] is None else [f"r = {effects['correlation']:.2f}"]
        lines.append(f"whole mask: {effects['all']['predicted']:+.3f}, {effects['all']['measured']:+.3f}")
        axes.text(0.02, 0.98, "\n".join(lines), va="top", fontsize=7, transform=axes.transAxes)

    rows = [
        (name, module, number(effect["predicted"]), number(effect["measured"]))
        for name, mask in masks.items()
        for module, effect in [*mask["effects"]["modules"].items(), ("the whole mask", mask["effects"]["all"])]
    ]
    panels = [Panel(name, lambda axes, e=mask["effects"]: draw(axes, e)) for name, mask in masks.items()]
    text = (
        "One dot per matrix whose removed weights alone become 0, on held-out rows; r is their correlation, and below "
        "it stand prediction and measurement of the whole mask. Below 0, removing lowers the loss. On the dashed line "
        "the first-order prediction would be right; the gap is what weights that are removed together do to each other."
    )
    columns = ("mask", "matrix", "predicted", "measured")
    return Chart("masks_effects", "What removing does: predicted and measured", text, panels, Table(columns, rows))


def module_grid(shares: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Layers, kinds of matrices, and the shares, (layers, kinds), NaN where a layer has no such matrix."""
    places = {module: (_layer(module), module.rpartition(".")[2]) for module in shares}
    layers = list(dict.fromkeys(layer for layer, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for module, (layer, kind) in places.items():
        grid[layers.index(layer), kinds.index(kind)] = shares[module]
    return layers, kinds, grid


def _layer(module: str) -> str:
    return next((part for part in module.split(".") if part.isdigit()), "other")


def _percent(mask: Mapping) -> str:
    """How much of its matrices a mask removes, for those that remove as much."""
    return f"{100 * mask['num_removed'] / mask['num_weights']:.0f}"


def _by_sparsity(masks: Mapping[str, Mapping]) -> dict[str, dict[str, Mapping]]:
    groups: dict[str, dict[str, Mapping]] = {}
    for name, mask in masks.items():
        groups.setdefault(_percent(mask), {})[name] = mask
    return groups


def _heads(mask: Mapping) -> dict[str, list[float]]:
    return {layer: shares["qkv"] for layer, shares in mask["by_head"].items() if "qkv" in shares}


def _entries(names: Mapping) -> list[Entry]:
    return [
        Entry(name, SERIES[index % len(SERIES)], ("-", "--", "-.")[index // 6 % 3], _MARKERS[index % 6])
        for index, name in enumerate(names)
    ]
