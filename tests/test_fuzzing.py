"""A few random changes of each kind of file, always the same; ``make fuzz`` makes as many as one has time for."""

import pytest

from fuzzing import TARGETS, examine


@pytest.mark.parametrize(("name", "num"), [("results", 150), ("adapters", 80), ("gguf", 150)])
def test_a_changed_file_is_read_or_refused_in_one_line(name, num, tmp_path):
    counts = examine(TARGETS[name](tmp_path / name), num)
    assert counts["read"] and counts["refused"]  # or the changes would show nothing
