"""The progress of commands, on a terminal and in a log."""

import io
import re

import pytest
from rich.console import Console

from maskft_base import runtime


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_gets_lines_and_a_terminal_a_bar(terminal, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None)
    with runtime.Progress(console) as progress:
        task = progress.add_task("gsm8k", total=4)
        progress.advance(task)
        assert terminal or not console.file.getvalue(), "no line for work that is done soon"
        monkeypatch.setattr(runtime, "SECONDS_BETWEEN_LINES", 0.0)
        progress.move(task, 2, "note", is_news=True)
        progress.advance(task)
    shown = console.file.getvalue()
    if terminal:
        assert re.search(r"gsm8k 3/4 .* 0 s left", shown)
    else:
        assert shown == "  gsm8k 2/4  note  0 s left\n  gsm8k 3/4  0 s left\n"
