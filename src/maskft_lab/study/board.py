"""What a study shows while it runs: one bar on a terminal, lines in a log."""

from __future__ import annotations

import math
import time
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from maskft.training.method_arguments import UNTRAINED_METHODS
from maskft_base import files
from maskft_base.runtime import shortened, time_text

from .execute import Study
from .plan import Plan, StudyRun
from .process import last_line
from .recipe import PRETRAINED

SECONDS_BETWEEN_LINES = 300.0  # of a log, while one run runs
_SECONDS_BETWEEN_REFRESHES = 0.5


class Board:
    """Runs done, time left, and of a run that runs the last line of its log, which has its held-out loss so far.

    Args:
        study: Where the runs are.
        plan: The runs; their settings are known.
        console: Where to show it.
        is_brief: In a log, say nothing when a run begins, and nothing of runs that are not trained.
    """

    def __init__(self, study: Study, plan: Plan, console: Console, is_brief: bool = False):
        self.study, self.plan, self.console, self.is_brief = study, plan, console, is_brief
        self.running: dict[StudyRun, float] = {}
        self.failed: dict[StudyRun, str] = {}
        self.seconds: dict[StudyRun, float] = {}
        self._todo: list[StudyRun] = []
        self._last_refresh = self._last_line = time.monotonic()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(plan.runs))

    def __enter__(self) -> Board:
        self._todo = [run for run in self.plan.runs if run not in self.failed and not self.study.is_done(run)]
        self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()

    def started(self, run: StudyRun) -> None:
        """Note that a run has begun."""
        self.running[run] = time.monotonic()
        if not self.is_brief:
            self._say(run, "started")

    def ended(self, run: StudyRun, reason: str | None = None) -> None:
        """Note that a run is finished, or that it failed and why."""
        self.seconds[run] = time.monotonic() - self.running.pop(run, time.monotonic())
        self._todo = [other for other in self._todo if other != run]
        if reason is not None:
            self.failed[run] = reason
        text = self._outcome(run) if reason is None else f"failed: {reason}"
        if reason is not None or _is_trained(run) or not self.is_brief:
            self._say(run, f"{text}, {self.seconds[run]:.0f} s", is_news=reason is not None)
        self._refresh()

    def tick(self) -> None:
        """Refresh what is shown, about twice a second."""
        now = time.monotonic()
        if now - self._last_refresh > _SECONDS_BETWEEN_REFRESHES:
            self._last_refresh = now
            self._refresh()
        if now - self._last_line > SECONDS_BETWEEN_LINES:
            for run in self.running:
                self._say(run, self._state(run) + self._left(", {} left in all"))

    def seconds_left(self) -> float | None:
        """Seconds until the last run ends if each takes as long as others of its method did.

        None before the first ends, and where only runs without training have ended, which say nothing about the others.
        """
        if not self.seconds or (any(map(_is_trained, self._todo)) and not any(map(_is_trained, self.seconds))):
            return None
        left = 0.0
        for run in self._todo:
            left += max(0.0, self._expected(run) - (time.monotonic() - self.running.get(run, time.monotonic())))
        return left / max(1, len(self.running))

    def _expected(self, run: StudyRun) -> float:
        """Seconds of runs like this one: of its method, or trained as it is, or any."""
        alike = [seconds for other, seconds in self.seconds.items() if other.method.name == run.method.name]
        alike = alike or [s for other, s in self.seconds.items() if _is_trained(other) == _is_trained(run)]
        return mean(alike or self.seconds.values())

    def _left(self, text: str) -> str:
        seconds = self.seconds_left()
        return "" if seconds is None else text.format(time_text(seconds))

    def _state(self, run: StudyRun) -> str:
        return last_line(self.study.run_folder(run) / files.LOG)

    def _outcome(self, run: StudyRun) -> str:
        heldout = self.study.heldout(run) if _is_trained(run) else None
        is_measured = heldout is not None and math.isfinite(heldout.loss)  # not where no step was taken
        return f"finished, held-out loss {heldout.loss:.4f}" if is_measured else "finished"

    def _say(self, run: StudyRun, state: str, is_news: bool = False) -> None:
        """A line for a log, which can hold no bar; on a terminal only what must not be missed."""
        self._last_line = time.monotonic()
        if is_news or not self.console.is_terminal:
            number = f"[{self.plan.runs.index(run) + 1}/{len(self.plan.runs)}]"
            self.console.print(f"{number} {run.title}: {state}", highlight=False, markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self.console.is_terminal:
            done = len(self.plan.runs) - len(self._todo)
            self._bar.update(self._task, completed=done, description=self._description(), refresh=True)

    def _description(self) -> str:
        """What fits beside the bar: time left, and the run that began first."""
        parts = [self._left("{} left")]
        run = next(iter(self.running), None)
        if run is not None:
            others = f" (and {len(self.running) - 1} more)" if len(self.running) > 1 else ""
            parts.append(f"{shortened(run.title, 20)}{others}: {self._state(run)}".removesuffix(": "))
        elif not self.seconds:
            parts.append("reading data")
        count = 2 * len(str(len(self.plan.runs))) + 1
        return shortened("  ".join(part for part in parts if part), self.console.width - 10 - count - 3)


def _is_trained(run: StudyRun) -> bool:
    return run.method.method not in (PRETRAINED, *UNTRAINED_METHODS)
