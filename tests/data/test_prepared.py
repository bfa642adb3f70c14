"""Rows kept for later runs are the rows a run without them would have made, and no others."""

import json

import pytest

from maskft.data.arguments import DataArguments
from maskft.data.prepared import data_identity, prepare
from maskft_common.errors import UserError
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": f"{n + 1}"}) + "\n" for n in range(30)))
    return file


def arguments(file, kept=None, **changes):
    return DataArguments(
        **{"dataset_name": str(file), "eval_split_size": 5, "prepared_data_dir": kept and str(kept), **changes}
    )


def folders(kept):
    return sorted(path.name for path in kept.iterdir())


def test_kept_rows_are_those_made(file, tmp_path):
    made = prepare(arguments(file), tiny_tokenizer(), max_length=16)
    kept = tmp_path / "kept"
    for _ in range(2):
        taken = prepare(arguments(file, kept), tiny_tokenizer(), max_length=16)
        for name in ("train", "heldout"):
            assert getattr(taken, name).to_list() == getattr(made, name).to_list()
        assert taken.report == made.report
        assert len(folders(kept)) == 1


def test_held_out_rows_of_one_prompt_are_a_cluster(file):
    """With each row twice they counted as independent, and one in six masks without an effect got a verdict."""
    assert "cluster_id" not in prepare(arguments(file), tiny_tokenizer()).heldout.column_names
    file.write_text(file.read_text() * 2)
    heldout = prepare(arguments(file, eval_split_size=6), tiny_tokenizer()).heldout
    clusters = heldout["cluster_id"][:]
    assert sorted(clusters.count(label) for label in set(clusters)) == [2, 2, 2]
    assert all(row["id"].removesuffix("#2") == row["cluster_id"] for row in heldout)


def test_a_second_run_does_not_read_the_data(file, tmp_path, monkeypatch):
    prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())
    monkeypatch.setattr("maskft.data.prepared.load_splits", lambda *_: pytest.fail("read again"))
    assert len(prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer()).train) == 25


@pytest.mark.parametrize("change", ["file", "length", "template", "split", "loss"])
def test_whatever_decides_the_rows_makes_others(change, file, tmp_path):
    kept, tokenizer = tmp_path / "kept", tiny_tokenizer()
    prepare(arguments(file, kept), tokenizer, max_length=16)
    options, how = {}, {"max_length": 16}
    if change == "file":
        file.write_text(file.read_text().replace("29+1=", "99+1="))
    elif change == "length":
        how = {"max_length": 6}
    elif change == "template":
        tokenizer.chat_template += " "
    elif change == "split":
        options = {"split_seed": 1}
    else:
        how["completion_only_loss"] = False
    changed = prepare(arguments(file, kept, **options), tokenizer, **how)
    assert len(folders(kept)) == 2
    fresh = prepare(arguments(file, **options), tokenizer, **how)
    assert changed.train.to_list() == fresh.train.to_list()


def test_a_moved_file_is_the_same_data(file, tmp_path):
    kept = tmp_path / "kept"
    prepare(arguments(file, kept), tiny_tokenizer())
    prepare(arguments(file.rename(tmp_path / "moved.jsonl"), kept), tiny_tokenizer())
    assert len(folders(kept)) == 1


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "heldout/state.json"])
def test_a_flipped_bit_is_told(name, file, tmp_path):
    prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())
    damaged = next((tmp_path / "kept").iterdir()) / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: {name} does not match its checksum; delete that folder to"):
        prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "input should be a valid dictionary"),
        ({"counts": [], "sha256": {}}, "counts"),
        ({"sha256": {}}, "counts is missing"),
        ({"counts": {}, "sha256": 3}, "counts"),
        ({"text": "\x1b[31m", "counts": {}}, "report.json"),
    ],
)
def test_a_report_of_another_structure_is_one_line(content, message, file, tmp_path):
    prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())
    folder = next((tmp_path / "kept").iterdir())
    (folder / "report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and "delete that folder" in str(error.value)


def test_rows_of_another_structure_are_one_line(file, tmp_path):
    """A stranger's folder can have checksums that match."""
    prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())
    folder = next((tmp_path / "kept").iterdir())
    report = json.loads((folder / "report.json").read_text())
    report["sha256"] = {}
    report["counts"]["taken"] = {"\x1b[31m": 25, "b": 1}
    (folder / "report.json").write_text(json.dumps(report))
    assert "\x1b" not in prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer()).report["text"]
    (folder / "train" / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot be read .* delete that folder"):
        prepare(arguments(file, tmp_path / "kept"), tiny_tokenizer())


def test_every_file_of_a_mixture_names_it(file, tmp_path):
    other = tmp_path / "metamathqa.jsonl"
    other.write_text('{"query": "a", "response": "b"}\n')
    name = {"dataset_name": f"{file}:10,metamathqa:1", "data_dir": str(tmp_path)}
    before = data_identity(name)
    assert str(tmp_path) not in json.dumps(before)
    other.write_text('{"query": "c", "response": "b"}\n')
    assert data_identity(name) != before
    assert data_identity(name | {"dataset_name": f"{file}:11,metamathqa:1"}) != data_identity(name)
    for of_tulu in ("numinamath_tir", "oasst_guanaco"):  # which take their own rows of one file
        (tmp_path / f"{of_tulu}.jsonl").write_text("{}")
    one, two = (data_identity(name | {"dataset_name": each}) for each in ("numinamath_tir", "oasst_guanaco"))
    assert one != two


def test_a_heldout_split_of_the_same_set_names_it(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / f"sums_{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    name = {"dataset_name": "me/sums", "data_dir": str(tmp_path), "dataset_eval_split": "dev"}
    before = data_identity(name)
    assert data_identity(name | {"dataset_eval_split": "test"}) != before
    (tmp_path / "sums_dev.jsonl").write_text('{"prompt": "c", "completion": "b"}\n')
    assert data_identity(name) != before
