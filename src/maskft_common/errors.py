"""Errors that the user can fix: one line that says what is wrong, the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NOT_UPDATED = "stopped before the update was applied"  # in the last line of a training that met a NotFiniteError
HOW_TO_INSTALL = "in maskft's repository: pip install -e '{}'"  # of ".", or of ".[EXTRA]"


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
        self.status = 128 + signal


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest of ``options``, or an empty string when none is close."""
    close = difflib.get_close_matches(name, [option for option in options if option != name], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def install_hint(extra: str) -> str:
    """The command that installs one of maskft's extras, for messages."""
    return HOW_TO_INSTALL.format(f".[{extra}]")


_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters that are drawn as nothing


def printable(text: str) -> str:
    r"""Return ``text`` with what cannot be seen (line breaks, a terminal's escape sequences) written as ``\x1b``."""
    return "".join(c if c.isprintable() and c not in _BLANK else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
