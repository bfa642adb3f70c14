"""What a training shows while it runs: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from maskft_base import runtime

_BAR_WIDTH = 8


class TrainingProgress(TrainerCallback):
    """Steps, time left, held-out loss so far and the last training loss, in 80 columns.

    On a terminal one bar; elsewhere a line at every held-out measurement and, between them, about every half a minute.

    Args:
        console: Where to show it.
        label: What stands before the bar: the method.
        noun: What is measured on held-out rows.
    """

    def __init__(self, console: Console, label: str, noun: str = "held-out loss"):
        self.console, self.label, self.noun = console, label, noun
        self.heldout: list[float] = []
        self._loss: float | None = None
        self._began: tuple[float, int] | None = None  # when the first step did, and which that was
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the bar; a resumed run knows what was measured before."""
        self.heldout = [float(row["eval_loss"]) for row in state.log_history if "eval_loss" in row]
        self._bar.start()
        self._task = self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step, state="")

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock, after what is measured before the first step."""
        if self._began is None:
            self._began = (time.monotonic(), state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self._move(state)
        if time.monotonic() - self._last_line > runtime.SECONDS_BETWEEN_LINES:
            self._line(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Note a loss; one on held-out rows is a line in a log."""
        logs = logs or {}
        if "loss" in logs:
            self._loss = float(logs["loss"])
        if "eval_loss" in logs:
            self.heldout.append(float(logs["eval_loss"]))
            self._line(state)
        self._move(state)

    def close(self) -> None:
        """Take the bar off the terminal, also after an error."""
        self._bar.stop()

    def _move(self, state) -> None:
        beside = len(self.label) + 2 * len(str(state.max_steps)) + 1 + 3
        text = "  ".join([*self._left(state), *self._losses("held-out")])
        text = runtime.shortened(text, self.console.width - beside - _BAR_WIDTH)
        self._bar.update(self._task, completed=state.global_step, state=text)

    def _line(self, state) -> None:
        if not self.console.is_terminal:
            step = f"  step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            line = "  ".join([step, *self._losses(self.noun), *self._left(state)])
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._last_line = time.monotonic()

    def _losses(self, heldout: str) -> list[str]:
        parts = []
        if self.heldout:
            last, best = self.heldout[-1], min(self.heldout)
            parts.append(f"{heldout} {last:.4f}" + (f" (best {best:.4f})" if best < last else ""))
        return parts if self._loss is None else [*parts, f"loss {self._loss:.4f}"]

    def _left(self, state) -> list[str]:
        if self._began is None or state.global_step >= state.max_steps:
            return []
        began, first = self._began
        left = runtime.seconds_left(time.monotonic() - began, state.global_step - first, state.max_steps - first)
        return [] if left is None else [f"{runtime.time_text(left)} left"]
