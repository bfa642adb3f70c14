"""Regular expressions from elsewhere: an adapter's configuration names layers by them, and some never end."""

from __future__ import annotations

import re

from maskft_base.errors import UserError

_MAX_REPETITIONS = 5  # on a name of 60 letters so many take a tenth of a second
_LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]", re.DOTALL)
_OPENINGS = re.compile(r"\(\?(?:P<\w+>|[:=!>]|<[=!])")
_REPEATED = re.compile(r"[*+]|\{\d*,\d*\}|\{\d+\}")
_GROUP = re.compile(r"\(([^()]*)\)(" + _REPEATED.pattern + ")?")
_HELD = "\0"  # stands for a group that holds repetitions or choices


def check_pattern(pattern: str, field: str) -> None:
    """Refuse a regular expression that may take for ever: repetitions inside of a repeated group, or many in a row.

    Raises:
        UserError: If it does.
    """
    text = _OPENINGS.sub("(", _LITERALS.sub("x", pattern))
    text = re.sub(r"([*+?}])[?+]", r"\1", text)  # lazy and possessive ones
    is_slow = len(_REPEATED.findall(text)) > _MAX_REPETITIONS
    while not is_slow and (group := _GROUP.search(text)):
        holds = bool(re.search(rf"[?|{_HELD}]", group[1]) or _REPEATED.search(group[1]))
        is_slow = holds and group[2] is not None
        text = text[: group.start()] + (_HELD if holds else "x") + (group[2] or "") + text[group.end() :]
    if is_slow:
        raise UserError(
            f"{field} is the regular expression {pattern!r}, which may take for ever: give a list of names, or "
            f"repeat no group that holds repetitions or choices, and no more than {_MAX_REPETITIONS} things"
        )
