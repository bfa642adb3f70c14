"""Errors that the user can fix: one line with the problem, the value and the remedy."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

# In the last line of a training that met a NotFiniteError.
NOT_UPDATED = "stopped before the update was applied"
# Names that options have in other commands and libraries, too far from ours to be taken for misspelt -> the option.
_ELSEWHERE = {
    "model": "model_name_or_path",
    "base": "model_name_or_path",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "resume": "resume_from_checkpoint",
}
# To be formatted with "." or ".[EXTRA]".
HOW_TO_INSTALL = "in maskft's repository: pip install -e '{}'"


class UserError(ValueError):
    """A mistake in the input. The command line prints its message as one line and exits with status 2."""


class NotFiniteError(UserError):
    """A loss, gradient or score became NaN or infinite."""


class Stopped(Exception):
    """Training was stopped by a signal, after a step that was saved.

    Attributes:
        status: Exit status of the process, 128 and the signal.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        # As shells report a process that a signal has ended.
        self.status = 128 + signal


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``options``, or an empty string when none is close."""
    others = [option for option in options if option != name]
    # Some parsers list options with their dashes.
    meant = _ELSEWHERE.get(name.lstrip("-"))
    for option in others:
        if meant is not None and option.lstrip("-") == meant:
            return f" (did you mean {option!r}?)"
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    if not close:
        return ""
    return f" (did you mean {close[0]!r}?)"


def install_hint(extra: str) -> str:
    """The command that installs one of maskft's extras, for messages."""
    return HOW_TO_INSTALL.format(f".[{extra}]")


# Code points that are printable for Python and drawn as nothing: invisible letters, and those that Unicode calls
# "default ignorable" (variation selectors, fillers). With them, two different names would look alike.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
# Marks that are drawn over the letter before them. Vietnamese and pointed Hebrew use up to three; hundreds cover the
# lines above and below.
_MAX_MARKS = 3


def printable(text: str) -> str:
    r"""Return ``text`` with everything that cannot be seen, or that hides other text, as an escape such as ``\x1b``.

    Escaped are line breaks, a terminal's escape sequences, invisible characters, and of each letter's combining marks
    all after the third.
    """
    shown = []
    num_marks = 0
    for character in text:
        # Nonspacing and enclosing marks, counted since the last character of another kind.
        is_mark = unicodedata.category(character) in ("Mn", "Me")
        num_marks = num_marks + 1 if is_mark else 0

        has_glyph = character.isprintable() and not _INVISIBLE.match(character)
        if has_glyph and num_marks <= _MAX_MARKS:
            shown.append(character)
        else:
            escape = character.encode("unicode_escape")
            shown.append(escape.decode())
    return "".join(shown)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the next if it ends in a colon; its type where it has none."""
    lines = []
    for line in str(error).splitlines():
        if line.strip():
            lines.append(line.strip())
    if not lines:
        return type(error).__name__
    first, *others = lines
    # What torch says of weights that do not fit is "Error(s) in loading state_dict for Model:", then a line for each.
    if first.endswith(":") and others:
        return f"{first} {others[0]}"
    return first
