"""Progress where there is no terminal."""

import io
import re

import pytest
from rich.console import Console

from maskft_base import runtime


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_gets_lines_and_a_terminal_a_bar(terminal, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with runtime.progress_bar(console) as bar:
        task = bar.add_task("gsm8k", total=4)
        for _ in range(4):
            bar.advance(task)
    lines = capsys.readouterr().err.splitlines()
    if terminal:
        assert not lines and "gsm8k" in console.file.getvalue()
    else:
        assert len(lines) == 4 and console.file.getvalue().strip() == ""
        assert re.fullmatch(r"gsm8k: 1 of 4, [\d.]+ a second, about 0 min left", lines[0])


def test_short_work_leaves_no_line(capsys):
    with runtime.progress_bar(Console(file=io.StringIO())) as bar:
        bar.advance(bar.add_task("gsm8k", total=1))
    assert capsys.readouterr().err == ""
