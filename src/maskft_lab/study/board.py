"""Progress of a study: one bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Console

from maskft_common.progress_bar import Progress, time_text

from .process import last_line
from .study_run import StudyRun

SECONDS_BETWEEN_LINES = 300.0  # in a log, while one run runs
SECONDS_BETWEEN_REFRESHES = 0.5  # on a terminal


class Board:
    """Runs finished, time left, and the last line of a running run's log, which has its held-out loss so far.

    Args:
        runs: The runs, whose settings are known.
        finished: Those of them that were finished before.
        log_of: A run's log.
        console: Where to show it.
        is_brief: In a log, show no lines for runs that start and finish, only for failures.
        failed: Runs that are not tried again, with the reason.
        costs: Expected cost of each run, in any unit, for the time left; None: all cost the same.
    """

    def __init__(
        self,
        runs: Collection[StudyRun],
        finished: Collection[StudyRun],
        log_of: Callable[[StudyRun], Path],
        console: Console,
        is_brief: bool = False,
        failed: Mapping[StudyRun, str] = {},
        costs: Mapping[StudyRun, float] | None = None,
    ):
        self.runs = runs
        self.console = console
        self.is_brief = is_brief
        self.failed = dict(failed)
        self._log_of = log_of
        # The count, for the bar, which begins with the runs that were finished before.
        self._num_done = len(finished) + len(failed)
        # The costs, for the time left. Runs that were finished before say nothing about the speed of this start.
        self._costs = costs or dict.fromkeys(runs, 1.0)
        ended_before = {*finished, *failed}
        self._cost_left = 0.0
        for run in runs:
            if run not in ended_before:
                self._cost_left += self._costs[run]
        self._cost_done = 0.0
        # A first run that only evaluates the base costs next to nothing and still takes its time: by its speed, the
        # others would take days.
        self._cost_of_estimate = fmean(self._costs.values()) if self._costs else 0.0
        self._began_at = time.monotonic()

        # When each running run was started, oldest first.
        self._started_at: dict[StudyRun, float] = {}

        self._progress = Progress(console)
        # As if something had just been shown: the first line about a running run comes after a whole pause.
        self._last_shown = time.monotonic()

    def __enter__(self) -> Board:
        # Here and not in the constructor: the bar is shown from now on.
        num_runs = len(self.runs)
        self._task = self._progress.add_task(
            "runs",
            total=num_runs,
            completed=self._num_done,
        )
        self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.stop()

    def started(self, run: StudyRun) -> None:
        """Note that a run has started."""
        self._started_at[run] = time.monotonic()
        self._show(f"{run.title}: started", is_news=not self.is_brief)

    def finished(self, run: StudyRun, outcome: str) -> None:
        """Note that a run is finished, with its outcome in words."""
        self._end(run, outcome, is_news=not self.is_brief)

    def has_failed(self, run: StudyRun, reason: str) -> None:
        """Note that a run failed."""
        self.failed[run] = reason
        self._end(run, f"failed: {reason}", is_news=True)

    def _end(
        self,
        run: StudyRun,
        outcome: str,
        is_news: bool,
    ) -> None:
        now = time.monotonic()
        started_at = self._started_at.pop(run, now)  # a run whose parent failed never started: 0 s
        seconds = now - started_at
        # The cost of a failed run is done too: it takes no more time.
        self._num_done += 1
        cost = self._costs[run]
        self._cost_done += cost
        self._cost_left -= cost

        text = f"{run.title}: {outcome}, {seconds:.0f} s"
        if run in self.failed and self.console.is_terminal:
            # The bar shows only the latest note; a failure is to stay on the screen.
            self.console.print(
                text,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        self._show(text, is_news)

    def tick(self) -> None:
        """Refresh the bar about twice a second; in a log, print a line now and then."""
        if self.console.is_terminal:
            pause = SECONDS_BETWEEN_REFRESHES
        else:
            pause = SECONDS_BETWEEN_LINES
        seconds_since = time.monotonic() - self._last_shown
        if not self._started_at or seconds_since <= pause:
            return

        # Only one run is shown: the bar has one line.
        run = next(iter(self._started_at))  # the one that has run longest
        num_others = len(self._started_at) - 1
        others = f" (and {num_others} more)" if num_others else ""
        line = last_line(self._log_of(run))
        self._show(f"{run.title}{others}: {line}", is_news=True)

    def _show(self, note: str, is_news: bool) -> None:
        """Show a note beside the bar; in a log only if it is news, as each note is a line there."""
        is_log = not self.console.is_terminal
        if is_log and not is_news:
            return
        # On a terminal every note replaces the last one; only news stays in a log.
        # The next line of `tick` comes a pause after this one.
        self._last_shown = time.monotonic()
        time_left = self._time_left()
        self._progress.move(
            self._task,
            self._num_done,
            note,
            is_news,
            time_left,
        )

    def _time_left(self) -> str:
        """Time left at the speed so far, by the cost of the finished runs; "" until they cost as much as a mean run."""
        if self._cost_done < self._cost_of_estimate or self._cost_left <= 0:
            return ""
        elapsed = time.monotonic() - self._began_at
        # Wall-clock time in relation to cost, so that runs side by side are counted in.
        seconds_left = elapsed * self._cost_left / self._cost_done
        return f"{time_text(seconds_left)} left"
