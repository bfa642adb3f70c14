"""Finished pieces on disk: resumed after a kill, never taken from a run with other settings."""

import json

import pytest

from maskft_common.errors import UserError
from maskft_lab.store import Store


def never():
    raise AssertionError("computed again")


def test_pieces_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    file = tmp_path / "new" / "pieces.jsonl"
    store = Store(file, {"model": "a"})
    assert not file.parent.exists()  # a run that raises before its first piece writes nothing
    assert store.get("x", lambda: (0.1, float("nan")))[0] == 0.1
    file.write_bytes(file.read_bytes() + '{"key": "y", "value": "é'.encode()[:-1])
    again = Store(file, {"model": "a"})
    assert again.get("x", never)[0] == 0.1 and again.get("y", lambda: {"b": 2}) == {"b": 2}
    assert Store(file, {"model": "a"}).get("y", never) == {"b": 2}
    again.remove()
    assert not file.exists()


def test_an_edited_line_is_computed_again(tmp_path):
    file = tmp_path / "pieces.jsonl"
    for key, value in (("x", "yes"), ("y", "no")):
        Store(file, {}).add(key, value)
    file.write_text(file.read_text().replace('"no"', '"edited"') + "[1]\n3\nnull\n{}\n")
    store = Store(file, {})
    assert store.values == {"x": "yes"} and store.get("y", lambda: "no") == "no"


def test_other_settings(tmp_path):
    file = tmp_path / "pieces.jsonl"
    Store(file, {"model": "a", "dtype": "x"}).add("k", 1)
    with pytest.raises(UserError, match=r"other settings \(model\); name another output_dir"):
        Store(file, {"model": "b", "dtype": "x"})
    assert Store(file, {"model": "a", "dtype": "x"}).values == {"k": 1}
    Store(file, {"model": "b"}, discard=True).add("k", 2)
    assert json.loads(file.read_text().split("\n")[0]) == {"model": "b"}


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "pieces.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link"):
        Store(tmp_path / "pieces.jsonl", {})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("depth", [100_000, 980, 900])
def test_a_line_of_many_brackets_is_ignored(depth, tmp_path):
    """Lists nested more deeply than Python's stack; 900 and 980 may be read, and cannot be written again."""
    file = tmp_path / "pieces"
    store = Store(file, {"a": 1})
    store.add("a", 1)
    nested = "[" * depth + "]" * depth
    with file.open("a") as out:
        out.write(nested + "\n")
        out.write('{"key": "b", "value": ' + nested + ', "sha256": "0"}\n')
        out.write('{"key": ["c"], "value": 1, "sha256": "0"}\n')
    assert Store(file, {"a": 1}).values == {"a": 1}


def test_a_first_line_of_many_brackets_is_no_settings(tmp_path):
    file = tmp_path / "pieces"
    file.write_text("[" * 100_000 + "\n")
    assert Store(file, {"a": 1}).values == {}
