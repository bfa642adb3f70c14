"""The figures: one table. A figure is one entry here and one function that makes its chart from the evidence.

To add one, write a function ``Evidence -> Chart`` (it raises `NotComputed` where its data is not there) and add an
entry to ``FIGURES``: then ``maskft report STUDY -o report.html`` shows it in its section, with its numbers as a table,
``--figures DIR --only KEY`` writes its files, and a study without its data lists it as not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from maskft_common.errors import UserError

from .charts import Chart
from .evidence import Evidence, NotComputed
from .fig_ablations import ablation_chart
from .fig_cost import cost_chart
from .fig_curves import curves_chart
from .fig_forest import against_mask_chart, forest_chart
from .fig_gain import gain_chart
from .fig_landscape import plane_chart
from .fig_masks import heads_chart, mean_heads_chart
from .fig_theory import bound_chart, curvature_chart


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: Name of its files and its place in a page.
        section: Of the report.
        title: Its title.
        draw: Makes it, or raises `NotComputed`.
        command: Makes its data; ``STUDY`` is replaced by the study's folder.
        numbers: Figures of the paper that it reproduces.
    """

    key: str
    section: str
    title: str
    draw: Callable[[Evidence], Chart]
    command: str
    numbers: tuple[int, ...] = ()


# Commands that make the data of figures.
_STUDY = "maskft study RECIPE.yaml"
_ANALYZE = "maskft analyze STUDY --what "


def _ablation(
    key: str,
    title: str,
    setting: str | None,
    values: str,
    *numbers: int,
) -> Figure:
    """The figure of one varied setting; None: of all settings that the paper does not vary."""
    grid = "any other setting of mask"
    if setting:
        grid = f"mask.{setting}: {values}"
    return Figure(
        key=key,
        section="ablations",
        title=f"Ablation: {title}",
        draw=partial(ablation_chart, setting),
        command=f"{_STUDY} # with a grid of {grid}",
        numbers=numbers,
    )


# Key, section, title, function, command, and the numbers of the paper's figures. In the order in which a page shows
# them within their sections.
FIGURES = (
    Figure("forest", "verdict", "Differences from the baseline", forest_chart, _STUDY),
    Figure("against_mask", "verdict", "The others against the mask", against_mask_chart, _STUDY),
    Figure("gain_forgetting", "verdict", "Gain and forgetting", gain_chart, f"{_STUDY} # with evaluation.before"),
    Figure("fig01_curves", "curves", "Held-out measures against steps", curves_chart, _STUDY, (1,)),
    _ablation("fig03_08_layers", "masked layers", "mask_layers_to_transform", "[[0, 1], [2, 3]]", 3, 8),
    _ablation("fig06_10_sparsity", "share removed", "mask_sparsity", "[0.05, 0.1, 0.2]", 6, 10),
    _ablation("fig07_11_rows", "training rows", "max_train_samples", "[500, 1000, 2000]", 7, 11),
    _ablation("ablations_other", "other settings", None, ""),
    Figure("fig13_heads", "masks", "Share removed by attention head", heads_chart, f"{_ANALYZE}masks", (13,)),
    Figure(
        "fig14_heads_mean", "masks", "Share removed by head, over layers", mean_heads_chart, f"{_ANALYZE}masks", (14,)
    ),
    Figure("fig05_12_landscape", "landscape", "Loss landscape", plane_chart, f"{_ANALYZE}landscape", (5, 12)),
    Figure("eq16_18_curvature", "theory", "Curvature", curvature_chart, f"{_ANALYZE}curvature"),
    Figure("table07_bound", "theory", "Generalisation bound", bound_chart, f"{_ANALYZE}bound"),
    Figure("fig04_09_cost", "cost", "Cost", cost_chart, _STUDY, (4, 9)),
)


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn: why, and the command that makes its data."""

    figure: Figure
    reason: str
    command: str


def draw_figures(
    evidence: Evidence,
    figures: Iterable[Figure],
) -> tuple[list[tuple[Figure, Chart]], list[Missing]]:
    """Draw the figures whose data is there, and return the others with the reason.

    Raises:
        UserError: If the file of an analysis is not as ``maskft analyze`` writes it.
    """
    drawn = []
    missing = []
    for figure in figures:
        # The command for this study, to be copied from the page.
        command = figure.command.replace("STUDY", evidence.place)
        try:
            chart = figure.draw(evidence)
        except NotComputed as error:
            # Expected: most studies have the data of some figures only.
            missing.append(Missing(figure, str(error), command))
        except UserError:
            # A UserError is a ValueError too. Its message says what to do already.
            raise
        # Charts read the fields of a file without checking each of them. A file that was damaged or written by hand
        # may raise any of these.
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{figure.key}: its data is not valid ({problem}). To compute it again: {command}"
            ) from error
        else:
            drawn.append((figure, chart))
    return drawn, missing


def select_figures(wanted: Sequence[str]) -> list[Figure]:
    """The figures of these numbers or keys, such as ``5`` or ``table07_bound``; all if none is named.

    Raises:
        UserError: If a number or key is not known.
    """
    if not wanted:
        return list(FIGURES)

    # A dictionary instead of a set: each figure once, in the order of the words.
    chosen = {}
    for word in wanted:
        # One number can mean several figures, and no figure has the number None.
        number = int(word) if word.isdecimal() else None
        found = []
        for figure in FIGURES:
            if figure.key == word or number in figure.numbers:
                found.append(figure)
        if not found:
            raise UserError(f"--only: no figure {word!r}; there are {_known_figures()}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _known_figures() -> str:
    """All words that `select_figures` takes."""
    numbers = set()
    for figure in FIGURES:
        numbers.update(figure.numbers)
    number_texts = [str(number) for number in sorted(numbers)]
    keys = [figure.key for figure in FIGURES]
    return ", ".join([*number_texts, *keys])
