"""Progress of a training: a bar on a terminal, or a line from time to time in a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID
from transformers import TrainerCallback

from maskft_common.progress_bar import Progress


class TrainingProgress(TrainerCallback):
    """Steps, time left, held-out loss so far and the last training loss.

    A log gets a line at every held-out measurement and, between them, about every half a minute.

    Args:
        console: Where to show it.
        has_budget: Whether checkpoints have to be within a budget of KL, so that the lowest loss need not be the best.
    """

    def __init__(self, console: Console, has_budget: bool = False):
        self._has_budget = has_budget
        self.heldout: list[float] = []
        self._kl: float | None = None
        self._part = 1.0
        self._loss: float | None = None
        self._progress = Progress(console)
        # Replaced when training begins: the number of steps is not known before.
        self._task = TaskID(0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the bar; a resumed run has earlier measurements in its history."""
        self.heldout = []
        for row in state.log_history:
            if "eval_loss" in row:
                self._see(row)

        self._progress.start()
        self._task = self._progress.add_task(
            "step",
            # Also with num_train_epochs: the Trainer has counted its steps by now.
            total=state.max_steps,
            completed=state.global_step,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self._progress.move(
            self._task,
            state.global_step,
            self._losses(),
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show a new loss; a held-out loss is a new line in a log."""
        logs = logs or {}
        # Training losses have the name loss, held-out measurements eval_loss, and the last line of a run has neither.
        if "loss" in logs:
            self._loss = float(logs["loss"])
        is_measured = "eval_loss" in logs
        if is_measured:
            self._see(logs)
        # News gets a line in a log at once, other changes from time to time.
        self._progress.move(
            self._task,
            state.global_step,
            self._losses(),
            is_news=is_measured,
        )

    def close(self) -> None:
        """Remove the bar from the terminal; called after errors too."""
        self._progress.stop()

    def _see(self, measured: dict[str, float]) -> None:
        self.heldout.append(float(measured["eval_loss"]))
        self._kl = measured.get("eval_kl")
        self._part = measured.get("eval_part", 1.0)

    def _losses(self) -> str:
        parts = []
        if self.heldout:
            last = self.heldout[-1]
            best = min(self.heldout)
            text = f"held-out {last:.4f}"
            if self._has_budget and self._kl is not None:
                text += f", KL {self._kl:.4f}"
                if self._part < 1:
                    text += f" at {self._part:.2f} of the change"
            # Without it, the last one is the best.
            elif best < last:
                text += f" (best {best:.4f})"
            parts.append(text)
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        return "  ".join(parts)
