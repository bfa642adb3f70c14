"""How methods look in every figure: colour, dash and marker; and the order and names of their runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import cycle, product

from .charts import SERIES, Entry

# As in the paper's Fig. 1, with shapes besides: no difference is shown by colour alone.
_LOOKS = {
    "full": ("blue", "-", "o"),
    "lora": ("green", "-", "s"),
    "mask": ("red", "-", "^"),
    "random_mask": ("orange", "--", "v"),
    "l1_mask": ("grey", "--", "D"),
    "wanda_mask": ("purple", "--", "h"),
    "pretrained": ("muted", ":", "x"),
}
_OTHERS = SERIES[2:]
_MARKERS = "^vdXosDPhp*"
_CONTROL = ("teal", "-.", "p")  # anything else: a restart, a part of the weights, models combined


def look(method: str | None, is_start: bool = True) -> tuple[str, str, str]:
    """Colour, dash and marker of a method; full fine-tuning that begins at another run's model is a control."""
    return _CONTROL if method == "full" and not is_start else _LOOKS.get(method or "", _CONTROL)


def series_looks(names: Iterable[str]) -> dict[str, Entry]:
    """A look for each name of a picture with many methods: masks red, full fine-tuning blue, all others in turn."""
    looks: dict[str, tuple[str, str]] = {}
    for name in names:
        kind = re.split(r",| (?:of|on|with)\b| [\d(\[]", name)[0]  # without settings, parents and variants
        colours, markers = (["blue"], "osDP") if kind.startswith("full") else (_OTHERS, "sDphP*o")
        if kind.endswith("mask") and not kind.startswith(("random", "L1", "Wanda")):
            colours = ["red"]
            markers = "^vdX"
        own = zip(cycle(colours), markers * len(colours), strict=False)
        free = [each for each in (*own, *product((*colours, *SERIES), _MARKERS)) if each not in looks.values()]
        looks[name] = free[0] if free else (colours[0], markers[0])
    return {name: Entry(name, colour, "", marker) for name, (colour, marker) in looks.items()}


def looks_in_turn(names: Iterable[str]) -> dict[str, Entry]:
    """A look for each of lines that are no methods."""
    distinct = enumerate(dict.fromkeys(names))
    return {name: Entry(name, SERIES[index % len(SERIES)], "-", "o^sDvP"[index % 6]) for index, name in distinct}


def entries_of(kinds: Mapping[str, tuple[str, bool]]) -> dict[str, Entry]:
    """Lines of a legend, by the arguments of `look`; further methods of one look have its colour alone."""
    looks: dict[str, tuple[str, ...]] = {}
    for name, kind in kinds.items():
        own = look(*kind)
        free = (each for each in (own, *product(own[:1], ("--", "-.", ":"), "sDPvX")) if each not in looks.values())
        looks[name] = next(free, own)
    return {name: Entry(name, *each) for name, each in looks.items()}


def number(value: float | None, digits: int = 4) -> str:
    """A number as tables show it: ``digits`` significant ones, thousands apart; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
