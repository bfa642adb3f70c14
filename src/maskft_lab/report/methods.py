"""How methods look in every figure (colour, dash and marker), and how tables write numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle, product
from typing import TypeVar

from .charts import SERIES, Entry

Look = TypeVar("Look", bound=tuple[str, ...])  # colour and marker, or colour, dash and marker

# The colours of the paper's Fig. 1. Each method has its own marker as well, because readers may not tell colours apart.
_LOOKS = {
    "full": ("blue", "-", "o"),
    "lora": ("green", "-", "s"),
    "mask": ("red", "-", "^"),
    "random_mask": ("orange", "--", "v"),
    "l1_mask": ("grey", "--", "D"),
    "wanda_mask": ("purple", "--", "h"),
    "pretrained": ("muted", ":", "x"),
}
# Controls: a restart, training of some weights, combined models.
_CONTROL = ("teal", "-.", "p")

# For pictures with many methods. The first two colours are those of masks and of full fine-tuning.
_OTHERS = SERIES[2:]
_MARKERS = "^vdXosDPhp*"
_LINE_MARKERS = "o^sDvP"


def look(
    method: str | None,
    is_start: bool = True,
) -> tuple[str, str, str]:
    """Colour, dash and marker of a method.

    Args:
        method: Its name; None: not known.
        is_start: Whether it begins at the base model or others begin at it. Full fine-tuning that does neither is a
            control.
    """
    is_restart = method == "full" and not is_start
    if method is None or is_restart:
        return _CONTROL
    return _LOOKS.get(method, _CONTROL)


def series_looks(names: Iterable[str]) -> dict[str, Entry]:
    """A look for each name of a picture with many methods: masks red, full fine-tuning blue, all others in turn."""
    looks = {}  # name -> colour and marker
    for name in names:
        # The name without settings, parents and variants: "mask, 30 % of full (best)" is a "mask".
        kind, *_ = re.split(r",| (?:of|on|with)\b| [\d(\[]", name)
        # Their names end in "mask", too.
        is_fixed = kind.startswith(("random", "L1", "Wanda"))
        is_learned_mask = kind.endswith("mask") and not is_fixed
        colours: Sequence[str]
        if is_learned_mask:
            colours = ["red"]
            markers = "^vdX"
        elif kind.startswith("full"):
            colours = ["blue"]
            markers = "osDP"
        else:
            colours = _OTHERS
            markers = "sDphP*o"

        # Colours and markers of the kind in turn, so that the second name differs from the first in both. A product
        # would change the marker alone.
        repeated_markers = markers * len(colours)
        in_turn = zip(cycle(colours), repeated_markers, strict=False)
        candidates = list(in_turn)

        # When all of these are taken, any other pair.
        any_colour = [*colours, *SERIES]
        # The colours of the kind first, with markers that it does not have by itself.
        candidates += product(any_colour, _MARKERS)
        looks[name] = _first_free(candidates, looks.values())

    entries = {}
    for name, (colour, marker) in looks.items():
        entries[name] = Entry(name, colour, "", marker)
    return entries


def looks_in_turn(names: Iterable[str]) -> dict[str, Entry]:
    """A look for each of several lines that are not methods."""
    looks = {}
    distinct = dict.fromkeys(names)  # not a set, which would lose the order
    for index, name in enumerate(distinct):
        colour = SERIES[index % len(SERIES)]
        marker = _LINE_MARKERS[index % len(_LINE_MARKERS)]
        looks[name] = Entry(name, colour, "-", marker)
    return looks


def entries_of(kinds: Mapping[str, tuple[str, bool]]) -> dict[str, Entry]:
    """Lines of a legend.

    Args:
        kinds: Name -> arguments of `look`. Of several names with one look, the first has it, others only its colour.
    """
    looks = {}  # name -> colour, dash and marker
    for name, (method, is_start) in kinds.items():
        # The look of the method, then the same colour with other dashes and markers.
        own = look(method, is_start)
        colour, _, _ = own
        variants = product([colour], ("--", "-.", ":"), "sDPvX")
        looks[name] = _first_free([own, *variants], looks.values())

    entries = {}
    for name, (colour, dash, marker) in looks.items():
        entries[name] = Entry(name, colour, dash, marker)
    return entries


def _first_free(
    candidates: Sequence[Look],
    taken: Collection[Look],
) -> Look:
    """The first candidate that no other name has."""
    for candidate in candidates:
        if candidate not in taken:
            return candidate
    # More names than looks: two names share one.
    return candidates[0]


def number(value: float | None, digits: int = 4) -> str:
    """A number for tables, with commas between thousands; a dash for None.

    Args:
        value: The number.
        digits: Significant digits; integers and whole numbers of 1000 or more have all of theirs.
    """
    if value is None:
        return "–"

    # Counts and bytes in full: format `g` would write large numbers as 1.235e+06.
    is_large_whole = abs(value) >= 1000 and value == int(value)
    if isinstance(value, int) or is_large_whole:
        return f"{int(value):,}"
    text = f"{value:.{digits}g}"
    # Format `g` switches to an exponent here, after rounding: 999.7 in three digits is 1e+03.
    if abs(float(text)) >= 10**digits:
        return f"{value:,.0f}"
    return text
