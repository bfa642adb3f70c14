"""What a training shows while it runs: one bar on a terminal, a line now and then in a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID
from transformers import TrainerCallback

from maskft_common.progress_bar import Progress


class TrainingProgress(TrainerCallback):
    """Steps, time left, held-out loss so far and the last training loss.

    In a log there is a line at every held-out measurement and, between them, about every half a minute.
    """

    def __init__(self, console: Console):
        self.heldout: list[float] = []
        self._loss: float | None = None
        self._progress, self._task = Progress(console), TaskID(0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the bar; a resumed run knows what was measured before."""
        self.heldout = [float(row["eval_loss"]) for row in state.log_history if "eval_loss" in row]
        self._progress.start()
        self._task = self._progress.add_task("step", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self._progress.move(self._task, state.global_step, self._losses())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Note a loss; one on held-out rows is a line in a log."""
        logs = logs or {}
        self._loss = float(logs["loss"]) if "loss" in logs else self._loss
        if "eval_loss" in logs:
            self.heldout.append(float(logs["eval_loss"]))
        self._progress.move(self._task, state.global_step, self._losses(), is_news="eval_loss" in logs)

    def close(self) -> None:
        """Take the bar off the terminal, also after an error."""
        self._progress.stop()

    def _losses(self) -> str:
        parts = []
        if self.heldout:
            last = self.heldout[-1]
            best = min(self.heldout)
            parts.append(f"held-out {last:.4f}" + (f" (best {best:.4f})" if best < last else ""))
        return "  ".join(parts if self._loss is None else [*parts, f"loss {self._loss:.4f}"])
