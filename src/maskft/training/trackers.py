"""Where metrics go besides ``training.json``: TensorBoard, trackio and others, by transformers' callbacks."""

from __future__ import annotations

import contextlib
import io

from rich.console import Console
from transformers import Trainer
from transformers.integrations import TrackioCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from maskft_base.errors import UserError, did_you_mean


def check_trackers(names: list[str]) -> None:
    """Refuse a name of ``report_to`` that transformers does not know, or whose package is not installed.

    Raises:
        UserError: For the first such name.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to: no {name!r}{did_you_mean(name, known)}; there are none, {', '.join(known)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(f"report_to {name}: {error}") from None


def quieten_trackio(trainer: Trainer, console: Console) -> None:
    """Let trackio, where ``trainer`` reports to it, say in one line what it prints in seven."""
    if any(isinstance(callback, TrackioCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(TrackioCallback)
        trainer.add_callback(_Trackio(console))


class _Trackio(TrackioCallback):
    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def setup(self, args, state, model, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self.console.print(f"trackio: to watch it, trackio show --project {args.project}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            super().on_train_end(args, state, control, **kwargs)
