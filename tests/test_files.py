"""Typed files: a mistake is one line with its place."""

import errno
import gzip
import json
import os
import re
import stat
import time
from pathlib import Path

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file

import tiny
from maskft_common.errors import UserError, first_line, printable
from maskft_common.files import (
    append_to,
    check_own_files,
    check_utf8,
    from_anywhere,
    new_folder,
    read_json,
    read_text,
    size,
    use_default_modes,
    whole_file,
    whole_folder,
    write_text,
)
from maskft_common.locks import held
from maskft_common.schema import FileModel, read_model
from maskft_common.yaml_file import read_yaml
from maskft_lab.cli.main import main


class Method(FileModel):
    rate: float = Field(gt=0)
    layers: list[int] | None = None


class Recipe(FileModel):
    name: str
    methods: dict[str, Method] = {}
    base: str | Method | None = None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "r.yaml: name is missing"),
        ({"nam": "x"}, r"r.yaml: unknown key 'nam' \(did you mean 'name'\?\)"),
        ({"methods": {"a": {"rat": 1}}}, "r.yaml: name is missing"),
        ({"name": "x", "method": {}}, r"r.yaml: unknown key 'method' \(did you mean 'methods'\?\); there are name"),
        ({"name": "x", "methods": {"a": {"rate": 1, "layer": [0]}}}, r"unknown key 'methods.a.layer' .*'layers'"),
        ({"name": "x", "methods": {"a": {"rate": -1.0}}}, "methods.a.rate is -1.0: input should be greater than 0"),
        ({"name": "x", "methods": {"a": {"rate": float("nan")}}}, "methods.a.rate is nan: .* finite"),
        ({"name": "x", "methods": {"a\nb": 1}}, r"r.yaml: methods.a\\nb is 1: "),
        ({"name": 3}, "name is 3: input should be a valid string"),
        ([], "input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(content, message):
    with pytest.raises(UserError, match=message) as error:
        read_model(Recipe, content, "r.yaml")
    assert "\n" not in str(error.value)


def test_what_is_right_is_returned_typed():
    recipe = read_model(Recipe, {"name": "x", "methods": {"a": {"rate": 1, "layers": [0, 1]}}}, "r.yaml")
    assert recipe.methods["a"].layers == [0, 1] and recipe.methods["a"].rate == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: two entries are named 'a'"),
        ("[" * 5000, "is not YAML"),
        ("a: !!map [1]", "is not YAML: expected a mapping node"),
        ("a: !!bool maybe", "is not YAML: 'maybe'"),
        ("a: !!int ''", "is not YAML: string index out of range"),
        ("? !!set {a}\n: 1", "line 1: a name must be text, not {'a'}"),
    ],
)
def test_recipes_that_are_refused(text, message, tmp_path, capsys):
    """Each through the reader of studies and through that of training."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_yaml(file)
    assert main(["train", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_json_that_is_a_bomb(tmp_path):
    file = tmp_path / "adapter_config.json"
    for text, message in (("[" * 100_000, "is not JSON"), ("{", "is not JSON"), ("1" * 5000, "is not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_json(file)
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    with pytest.raises(UserError, match="has more than 64 MiB"):
        read_json(file)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path):
    file = tmp_path / "result.json.gz"
    with gzip.open(file, "wb") as stream:
        for _ in range(65):
            stream.write(b" " * 2**20)
    assert file.stat().st_size < 100_000
    with pytest.raises(UserError, match="has more than 64 MiB of text"):
        read_text(file)


@pytest.mark.parametrize("read", [read_json, read_text, read_yaml])
def test_a_pipe_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe or a device, not a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "value"),
    [("a: 1:30", "1:30"), ("a: 1:30.5", "1:30.5"), ("a: 0x10", 16), ("a: 1e-3", 0.001), ("a: '3'", "3"), ("a: 3", 3)],
)
def test_numbers_of_yaml(text, value, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    assert read_yaml(tmp_path / "r.yaml") == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("a: &a [x, x, x]\nb: &b [*a, *a, *a]\n" + "c: [*b, *b]\n", ""),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 10)),
            "repeats its aliases",
        ),
        ("a: &a [*a]", "repeats its aliases"),
        (
            "a0: &a0 !!pairs [x: 1]\n"
            + "".join(f"a{n}: &a{n} !!pairs [{f'x: *a{n - 1}, ' * 9}]\n" for n in range(1, 10)),
            r"\('x', 1\) is of a kind that is not read",
        ),
        ("a: " + "x" * 2**20, "has more than 1 MiB"),
    ],
)
def test_yaml_that_is_a_bomb(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    if not message:  # aliases are not refused
        assert read_yaml(tmp_path / "r.yaml")["c"]
        return
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "r.yaml")


def test_a_number_in_base_60_takes_no_time(tmp_path):
    """600 kB of it took minutes."""
    (tmp_path / "r.yaml").write_text("a: 1" + ":1" * 300_000)
    started = time.monotonic()
    assert read_yaml(tmp_path / "r.yaml")["a"].startswith("1:1")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31m\n", "\\x1b[31m\\n"),
        ("a\ufe0f", "a\\ufe0f"),
        ("e\u0301", "e\u0301"),
        ("a" + "\u0301" * 5, "a" + "\u0301" * 3 + "\\u0301" * 2),
        ("\u05d1\u05bc\u05b0", "\u05d1\u05bc\u05b0"),  # a pointed letter
        ("\U000e0100", "\\U000e0100"),
    ],
)
def test_invisible_and_stacked_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_saved_weights_can_be_read_by_whom_other_files_can_be_read(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0o600)  # as some versions of safetensors leave it
    (tmp_path / "config.json").write_text("{}")
    use_default_modes(tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes.keys() == {"model.safetensors", "config.json"} and len({*modes.values()}) == 1


# Links that lead out of a stranger's folder


def test_a_link_out_of_a_folder_is_refused(tmp_path):
    (tmp_path / "key").write_text("secret")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "inside").symlink_to("config.json")
    (folder / "config.json").write_text("{}")
    check_own_files(folder)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"chat_template\.jinja' is a link to '.*key', outside of its folder"):
        check_own_files(folder)


def test_a_folder_that_is_a_link_and_is_read_is_refused(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "templates").symlink_to(tmp_path / "keys")
    check_own_files(tmp_path / "adapter")
    with pytest.raises(UserError, match="outside of its folder"):
        check_own_files(tmp_path / "adapter", ["templates"])


def test_blobs_of_the_hub_s_cache_pass(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "9f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/9f")
    check_own_files(snapshot)
    (snapshot / "other.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside of its folder"):
        check_own_files(snapshot)


def test_bytes_are_told_in_units_that_say_something():
    assert [size(n) for n in (0, 5e6, 3.21e10)] == ["0 bytes", "5 MB", "32.1 GB"]
    assert [size(n) for n in (999, 999_499, 999_600)] == ["999 bytes", "999 kB", "1 MB"]


def test_a_folder_that_is_made_whole_takes_no_name_that_is_there(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("kept")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out.partial" / "mine").read_text() == "kept"


def test_the_content_of_a_folder_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        assert not (tmp_path / "out").exists()
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        (folder / "below").mkdir()
        (folder / "below" / "b").write_text("b")
        (folder / "link").symlink_to("missing")
    assert sorted(synced) == ["a", "b"]


def test_a_folder_that_its_last_owner_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    mkdir = Path.mkdir
    calls = []

    def removed_once(folder, *args, **kwargs):
        calls.append(folder)
        if len(calls) == 1:
            raise FileNotFoundError
        mkdir(folder, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", removed_once)
    with held(tmp_path / "out", "lock", 10.0, "run") as hold:
        assert not hold.is_left_over
        assert (tmp_path / "out" / "lock").is_file()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_that_is_not_whole_leaves_nothing(error, tmp_path):
    """Ctrl-C as well, which is no Exception."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(error), whole_file(tmp_path / "out") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "out").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with whole_file(tmp_path / "out") as file:
        file.write(b"new")
    assert (tmp_path / "out").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_folder_is_one_that_can_be_made(tmp_path, monkeypatch):
    """Before minutes are spent on its content."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^output_dir is an empty name; name a new folder$"):
        new_folder("", "output_dir")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output_dir '.*/file/a/b': '.*/file' is not a folder; name another folder$"):
        new_folder(tmp_path / "file" / "a" / "b", "output_dir")
    assert new_folder(tmp_path / "a" / "b", "output_dir") == tmp_path / "a" / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/new", "output_dir") == tmp_path / "new"
    # The superuser may write anywhere, so that taking the permission away shows nothing.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"^output '.*/a/b': '{tmp_path}' cannot be written to; name another folder$"):
        new_folder(tmp_path / "a" / "b", "output")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("", "ValueError"),
        ("one\ntwo", "one"),
        # As torch reports weights that do not fit.
        ("Error(s) in loading:\n\n\tsize mismatch for up: 2\n\tand 3", "Error(s) in loading: size mismatch for up: 2"),
        ("only this:", "only this:"),
    ],
)
def test_the_line_of_an_error_that_is_shown(message, shown):
    assert first_line(ValueError(message)) == shown


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic link"):
        append_to(tmp_path / "answers.jsonl")
    write_text(tmp_path / "answers.jsonl", "new")
    assert (tmp_path / "mine").read_text() == "kept" and (tmp_path / "answers.jsonl").read_text() == "new"


def test_a_link_to_a_gguf_file_keeps_its_name(tmp_path, monkeypatch):
    """As in the hub's cache and over Ollama's blobs: by the name of its target it would not be known as GGUF."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha256-1f").write_text("model")
    (tmp_path / "model.GGUF").symlink_to(tmp_path / "blobs" / "sha256-1f")
    monkeypatch.chdir(tmp_path)
    assert from_anywhere("model.GGUF") == str(tmp_path / "model.GGUF")
    assert from_anywhere("blobs/../model.GGUF") == str(tmp_path / "model.GGUF")


@pytest.mark.parametrize("place", ["log.txt", "runs/full-s0/log.txt", "results/full/result.json"])
def test_an_output_folder_with_a_link_is_refused(place, tmp_path):
    link = tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link and no file of ours"), held(tmp_path / "out", "lock", 0.0, "run"):
        raise AssertionError
    assert not (tmp_path / "elsewhere").exists()


def test_an_output_folder_that_is_a_link_leads_to_a_folder(base, data, tmp_path, capsys):
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    tiny.save_masks({"up": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "mask")
    for name in ("nowhere", "loop"):
        words = ["--output_dir", str(tmp_path / name)]
        assert main(["merge", str(tmp_path / "mask"), *words]) == 2
        assert main(["evaluate", "--model_name_or_path", str(base), "--dataset_name", str(data), *words]) == 2
        assert capsys.readouterr().err.count("is a link that leads to no folder") == 2
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with held(tmp_path / "runs", "lock", 0.0, "run"):
        assert (tmp_path / "disk" / "lock").is_file()


def test_nothing_is_made_below_a_link_to_no_folder(tmp_path):
    """Before the work: Path.resolve raised RuntimeError for a loop, and no folder can be made below it."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("loop", "nowhere"):
        message = rf"'.*/{name}/a/b': '.*/{name}' is a link that leads to no folder"
        with pytest.raises(UserError, match=message):
            new_folder(tmp_path / name / "a" / "b", "output_dir")
        with pytest.raises(UserError, match=message), held(tmp_path / name / "a" / "b", "lock", 0.0, "run"):
            raise AssertionError


def test_a_link_to_itself_in_a_stranger_s_folder_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"loop' is a link to .*, outside of its folder"):
        check_own_files(tmp_path)


def test_names_that_are_not_utf_8(tmp_path):
    """Records of a data file can have its name; files of weights cannot."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    write_text(tmp_path / "result.json", json.dumps({"file": name}, ensure_ascii=False))
    assert read_json(tmp_path / "result.json") == {"file": name}
    with append_to(tmp_path / "answers.jsonl") as stream:
        stream.write(json.dumps(name, ensure_ascii=False))
    assert read_json(tmp_path / "answers.jsonl") == name
    with pytest.raises(UserError, match=r"output 'caf\\udce9.jsonl' is not UTF-8"):
        check_utf8(name, "output")
    with pytest.raises(UserError, match=r"is not UTF-8, as names of weight files must be; name another"):
        new_folder(tmp_path / name, "output_dir")


def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch):
    """As root, --output /dev/null made a file of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match="is a pipe or a device, not a regular file; name a file"):
            write_text(tmp_path / name, "text")
    assert stat.S_ISFIFO((tmp_path / "link").stat().st_mode)

    # A link, whatever it leads to: stdout may be a file. Nothing is written here, even if it is not refused.
    def write_nothing(path):
        raise AssertionError(path)

    monkeypatch.setattr("maskft_common.files.whole_file", write_nothing)
    with pytest.raises(UserError, match="'/dev/stdout' is "):
        write_text("/dev/stdout", "text")


def test_a_full_disk_is_not_advised_to_take_another_path(tmp_path, monkeypatch):
    """Files of a study have fixed names: nobody can give another path."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"run\.json: cannot be written \(No space left on device\): make room"):
        write_text(tmp_path / "run.json", "{}")
    assert not any(tmp_path.iterdir())
