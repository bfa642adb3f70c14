"""What a study shows while it runs: one bar on a terminal, lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console

from maskft_common import layout
from maskft_common.progress_bar import Progress

from .execute import Study
from .plan import Plan
from .process import last_line
from .runs import StudyRun

SECONDS_BETWEEN_LINES = 300.0  # of a log, while one run runs
SECONDS_BETWEEN_REFRESHES = 0.5  # of a terminal


class Board:
    """Runs finished, time left, and of a run that runs the last line of its log, which has its held-out loss so far.

    Args:
        study: Where the runs are.
        plan: The runs; their settings are known.
        console: Where to show it.
        is_brief: In a log, say nothing of runs that begin and end, unless they fail.
        failed: Runs that are not tried again, with the reason.
    """

    def __init__(
        self,
        study: Study,
        plan: Plan,
        console: Console,
        is_brief: bool = False,
        failed: Mapping[StudyRun, str] = {},
    ):
        self.study, self.plan, self.console, self.is_brief = study, plan, console, is_brief
        self.running: dict[StudyRun, float] = {}
        self.failed = dict(failed)
        self._progress = Progress(console)
        self._last = time.monotonic()

    def __enter__(self) -> Board:
        self._num_done = sum(run in self.failed or self.study.is_done(run) for run in self.plan.runs)
        self._task = self._progress.add_task("runs", total=len(self.plan.runs), completed=self._num_done)
        self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.stop()

    def started(self, run: StudyRun) -> None:
        """Note that a run has begun."""
        self.running[run] = time.monotonic()
        self._show(f"{run.title}: started", is_news=not self.is_brief)

    def ended(self, run: StudyRun, reason: str | None = None) -> None:
        """Note that a run is finished, or that it failed and why."""
        seconds = time.monotonic() - self.running.pop(run, time.monotonic())
        self._num_done += 1
        text = f"{run.title}: {self._outcome(run) if reason is None else f'failed: {reason}'}, {seconds:.0f} s"
        if reason is not None:
            self.failed[run] = reason
            if self.console.is_terminal:  # where a bar would hide it
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._show(text, is_news=reason is not None or not self.is_brief)

    def tick(self) -> None:
        """Refresh what is shown, about twice a second; in a log, a line now and then."""
        pause = SECONDS_BETWEEN_REFRESHES if self.console.is_terminal else SECONDS_BETWEEN_LINES
        if self.running and time.monotonic() - self._last > pause:
            run = next(iter(self.running))
            others = f" (and {len(self.running) - 1} more)" if len(self.running) > 1 else ""
            state = last_line(self.study.run_folder(run) / layout.LOG)
            self._show(f"{run.title}{others}: {state}", is_news=True)

    def _show(self, note: str, is_news: bool) -> None:
        if is_news or self.console.is_terminal:
            self._last = time.monotonic()
            self._progress.move(self._task, self._num_done, note, is_news)

    def _outcome(self, run: StudyRun) -> str:
        loss = getattr(self.study.heldout(run), "loss", math.inf)  # infinite, too, where no step was taken
        without = "finished" if run.tried is None else "diverged"
        return f"finished, held-out loss {loss:.4f}" if math.isfinite(loss) else without
