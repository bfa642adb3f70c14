"""Progress of a training run on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 30.0


def progress_bar(console: Console | None = None, disable: bool = False) -> Progress:
    """The progress bar of all evaluations: what, share done, count, time left; lines on stderr without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return _BarOrLines(*columns, console=console, disable=disable, transient=True)


class _BarOrLines(Progress):
    """A bar on a terminal; in a log, which would show none, a line every half a minute."""

    def __init__(self, *columns, **options):
        super().__init__(*columns, **options)
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._advanced = 0.0  # of the last task; one that goes on from an earlier run does not begin at 0

    def add_task(self, *args, **kwargs) -> TaskID:
        self._advanced = 0.0
        return super().add_task(*args, **kwargs)

    def advance(self, task_id, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._advanced += advance
        if self.disable or self.console.is_terminal or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        task = next(task for task in self.tasks if task.id == task_id)
        # The mean since the start: answers come in bursts, and the bar's own estimate follows those.
        speed = self._advanced / task.elapsed
        print(
            f"{task.description}: {task.completed:g} of {task.total:g}, {speed:.2f} a second, "
            f"about {(task.total - task.completed) / speed / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


class RichProgress(TrainerCallback):
    """One bar with step, loss and time left; one line per held-out measurement. Replaces transformers' tqdm bars."""

    def __init__(self, console: Console, label: str):
        self.console, self.label = console, label
        self._progress: Progress | None = None
        self._last_loss = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._progress.start()
        self._bar = self._progress.add_task(self.label, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress:
            self._progress.update(self._bar, completed=state.global_step, description=f"{self.label}{self._last_loss}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        held_out = logs.get("eval_loss")
        if "loss" in logs:
            self._last_loss = f" loss {float(logs['loss']):.4f}"
        if held_out is not None:
            self.console.print(f"  step {state.global_step:>5}  held-out loss {float(held_out):.4f}", highlight=False)
        elif "loss" in logs and not self.console.is_terminal:
            extra = f"  flips {logs['mask_flips_per_step']:,}" if "mask_flips_per_step" in logs else ""
            self.console.print(
                f"  step {state.global_step:>5}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"{logs.get('tokens_per_s', 0):.0f} tokens/s{extra}",
                highlight=False,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also after an error."""
        if self._progress:
            self._progress.stop()
            self._progress = None
