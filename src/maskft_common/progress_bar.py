"""The progress of a command: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 8


def time_text(seconds: float) -> str:
    """``90 s`` and longer in minutes, ``90 min`` and longer in hours: ``12 s``, ``34 min``, ``1.6 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns of a terminal; a text that is cut ends in an ellipsis."""
    # rich counts columns: a Chinese character takes two.
    shown = Text(text)
    shown.truncate(max(width, 1), overflow="ellipsis")
    return shown.plain


class Progress(rich.progress.Progress):
    """The progress of a command: a bar on a terminal; in a log a line about every half a minute.

    Beside the count of each task it shows the time left, at the mean speed so far, and a note.
    """

    def __init__(self, console: Console | None = None):
        # stdout is for results, which may be piped.
        console = console or Console(stderr=True)
        # Without markup: descriptions hold names of users' files, and [red] in one is text.
        super().__init__(
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            # The bar goes when it is done, and leaves the terminal to the results.
            transient=True,
            # In a log `move` prints lines in its place.
            disable=not console.is_terminal,
        )
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        # Task -> time at its start, and the count completed by then.
        self._began: dict[TaskID, tuple[float, float]] = {}

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        """Add a task, whose speed is measured from now on."""
        task_id = super().add_task(description, *args, note="", **kwargs)
        # A task that continues begins with a count above 0, which this process has not done.
        task = self._task(task_id)
        self._began[task_id] = (time.monotonic(), task.completed)
        return task_id

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task, whose total must be known."""
        task = self._task(task_id)
        self.move(task_id, task.completed + advance)

    def move(
        self,
        task_id: TaskID,
        completed: float,
        note: str = "",
        is_news: bool = False,
        time_left: str | None = None,
    ) -> None:
        """Set how much of a task is completed.

        Args:
            task_id: The task.
            completed: All of it so far.
            note: Text to show beside it.
            is_news: Whether a log gets a line now.
            time_left: Text in place of the time left at the mean speed so far; "" shows none.
        """
        task = self._task(task_id)
        # As wide as the total, so that lines of a log are aligned.
        total = f"{task.total:g}"
        count = f"{completed:>{len(total)}g}/{total}"
        if time_left is None:
            time_left = self._left(task_id, completed)
        parts = [part for part in (time_left, note) if part]

        if self.console.is_terminal:
            # The note gets the rest of the line, besides three columns and a space between each two of the four.
            num_gaps = 3
            num_used = len(task.description) + len(count) + _BAR_WIDTH + num_gaps
            num_left = self.console.width - num_used
            text = shortened("  ".join(parts), num_left)
            self.update(task_id, completed=completed, note=text)
            return

        # A log.
        self.update(task_id, completed=completed)
        if is_news or time.monotonic() > self._next_line:
            # The note comes before the time left here: it is the news.
            line = "  ".join([f"  {task.description} {count}", *reversed(parts)])
            self.console.print(
                line,
                highlight=False,
                markup=False,
                # Not wrapped: rich takes a file for 80 columns wide.
                soft_wrap=True,
            )
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def _left(self, task_id: TaskID, completed: float) -> str:
        began, first = self._began[task_id]
        total = self._task(task_id).total or completed
        # Nothing is measured yet, or nothing is left.
        if completed <= first or completed >= total:
            return ""
        seconds_so_far = time.monotonic() - began
        seconds_each = seconds_so_far / (completed - first)
        seconds = seconds_each * (total - completed)
        return f"{time_text(seconds)} left"

    def _task(self, task_id: TaskID) -> Task:
        return next(task for task in self.tasks if task.id == task_id)
