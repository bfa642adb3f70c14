"""What a training run shows while it runs: one bar on a terminal, lines in a log."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class RichProgress(TrainerCallback):
    """One bar with step, loss and time left; one line per held-out measurement. Replaces transformers' tqdm bars."""

    def __init__(self, console: Console, label: str):
        self.console, self.label = console, label
        self._progress: Progress | None = None
        self._last_loss = ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the bar."""
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
        """Move the bar."""
        if self._progress:
            self._progress.update(self._bar, completed=state.global_step, description=f"{self.label}{self._last_loss}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a held-out measurement, or a step where there is no bar."""
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
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal, also after an error."""
        if self._progress:
            self._progress.stop()
            self._progress = None
