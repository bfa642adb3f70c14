"""The manifest of a checkpoint: what it holds, what is damage, and which settings a run must keep."""

import dataclasses
import enum
import json
import re

import pytest
import torch
from datasets import Dataset

from maskft.data.prepared import Prepared
from maskft.models import model_identity
from maskft.training.manifest import FREE, _plain, check_course, course_of, damage, read_manifest, seal
from maskft.training.near_base import KLRows
from maskft.training.options import option_defaults, parse_words
from maskft_common import files, layout
from maskft_common.errors import UserError

SHA256 = re.compile("(sha256:)?[0-9a-f]{64}")


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "checkpoint-1"
    (folder / "parts").mkdir(parents=True)
    (folder / "b.bin").write_bytes(b"b")
    (folder / "a.bin").write_bytes(b"a")
    (folder / "parts" / "c.bin").write_bytes(b"c")
    seal(folder, {"seed": 3})
    return folder


def test_every_file_is_in_it_and_it_is_the_same_when_written_again(sealed):
    digests = {name: files.digest(name[-5:-4]) for name in ("a.bin", "b.bin", "parts/c.bin")}
    text = json.dumps({"format": 2, "course": {"seed": 3}, "files": digests}, indent=1)
    assert (sealed / layout.MANIFEST).read_text() == text + "\n"
    seal(sealed, {"seed": 3})
    assert (sealed / layout.MANIFEST).read_text() == text + "\n"
    assert read_manifest(sealed).files == digests and read_manifest(sealed).course == {"seed": 3}


def test_damage(sealed):
    assert damage(sealed) is None
    (sealed / "parts" / "c.bin").write_bytes(b"d")
    assert damage(sealed) == "parts/c.bin has changed since it was written (sha256)"
    (sealed / "a.bin").unlink()
    assert damage(sealed) == "a.bin is missing"
    (sealed / layout.MANIFEST).write_text("{}")
    assert damage(sealed) == "its manifest.json cannot be read"
    (sealed / layout.MANIFEST).unlink()
    assert damage(sealed) == "it has no manifest.json, which is written last"


def test_a_manifest_that_is_none_is_named(sealed):
    (sealed / layout.MANIFEST).write_text('{"format": 2, "course": {}}')
    with pytest.raises(UserError, match=f"^{re.escape(str(sealed / layout.MANIFEST))}: files is missing$"):
        read_manifest(sealed)


# The course


def rows(*tokens):
    return Dataset.from_list([{"input_ids": [token], "labels": [token + 1], "source": "x"} for token in tokens])


DATA = Prepared(rows(1, 2, 3), rows(4, 5), {})


@pytest.fixture
def course(base, data, tmp_path):
    """The course of a run, with changes of its options."""

    def course(rows=DATA, kl_rows=None, **changes):
        options = {"model_name_or_path": base, "dataset_name": data, "output_dir": tmp_path, "bf16": "false", **changes}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        config, _, _ = parse_words(words)
        return course_of(config, rows, kl_rows)

    return course


def test_the_course_has_every_option_that_must_not_change(course, base):
    found = course(seed=7, optim="sgd")
    beside = {"data", "kl_data", "base", "num_processes"}
    # data_dir is in the content of the files that it leads to.
    assert found.keys() == (option_defaults().keys() - FREE - {"data_dir"}) | beside
    assert (found["seed"], found["optim"], found["num_processes"], found["kl_data"]) == (7, "sgd", 1, None)
    assert found["base"] == model_identity(str(base)) and SHA256.fullmatch(found["base"])
    assert SHA256.fullmatch(found["data"])
    assert found == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    "changed",
    [
        Prepared(rows(1, 2, 9), rows(4, 5), {}),
        Prepared(rows(2, 1, 3), rows(4, 5), {}),
        Prepared(rows(1, 2, 3), rows(4, 6), {}),
        Prepared(rows(1, 2), rows(3, 4, 5), {}),
        Prepared(DATA.train.map(lambda row: {"labels": [0]}), DATA.heldout, {}),
    ],
)
def test_rows_are_compared_by_their_tokens_and_labels_in_order(changed, course):
    before = course()
    assert course(changed)["data"] != before["data"]
    others = Prepared(DATA.train.remove_columns("source"), DATA.heldout, {"counts": {}})
    assert course(others) == before


def test_rows_of_kl_are_compared_too(course):
    with_kl = course(kl_rows=KLRows(DATA.train, DATA.heldout))
    assert with_kl["kl_data"] == with_kl["data"]
    assert course(kl_rows=KLRows(rows(8), rows(9)))["kl_data"] != with_kl["data"]


def test_adapters_and_models_are_compared_by_their_content(course, base, tmp_path):
    for number in (1, 2):
        folder = tmp_path / f"mask{number}"
        folder.mkdir()
        (folder / layout.ADAPTER_WEIGHTS).write_bytes(b"the same")
    first = course(start_mask=tmp_path / "mask1")
    assert first["start_mask"] == "sha256:" + files.digest("the same")
    assert course(start_mask=tmp_path / "mask2") == first
    (tmp_path / "mask2" / layout.ADAPTER_WEIGHTS).write_bytes(b"another one")
    assert course(start_mask=tmp_path / "mask2") != first
    # A name of a hub stays as it is.
    assert course(start_mask="somebody/mask")["start_mask"] == "somebody/mask"
    before = course(mask_removed_value="base", mask_removed_value_model=base)
    assert before["mask_removed_value_model"] == model_identity(str(base))


class Kind(enum.Enum):
    FIRST = "first"


@dataclasses.dataclass
class Part:
    size: int = 1


def test_values_are_compared_as_json_stores_them():
    value = {"enum": Kind.FIRST, "part": Part(), "tuple": (1, None), "class": Part, "dtype": torch.bfloat16}
    assert _plain(value) == {
        "enum": "first",
        "part": {"size": 1},
        "tuple": [1, None],
        "class": "<class 'type'>",
        "dtype": "<class 'torch.dtype'>",
    }


# A run that is resumed


def test_every_difference_is_in_one_line(sealed):
    at_the_limit, beyond = "x" * 40, "y" * 41
    seal(sealed, {"seed": 3, "data": "old", "optim": at_the_limit, "kl_data": None, "gone": 1})
    now = {"seed": 4, "data": "new", "optim": beyond, "kl_data": [1, 2], "learning_rate": None}
    with pytest.raises(UserError) as raised:
        check_course(sealed, now)
    shown = f"data: old -> new; kl_data: null -> [1, 2]; optim: {at_the_limit} -> {'y' * 37}...; seed: 3 -> 4"
    assert str(raised.value) == (
        f"{str(sealed)!r} is from a run with other settings or data ({shown}); give the options of that run to resume "
        "it, or name another output_dir"
    )


def test_a_run_with_the_same_course_is_resumed(sealed, course):
    seal(sealed, course())
    check_course(sealed, course())
    # Written before there was this option, whose default holds; and one that has gone since.
    seal(sealed, {name: value for name, value in course().items() if name != "weight_decay"} | {"gone": 1})
    check_course(sealed, course())
    with pytest.raises(UserError, match=re.escape("(weight_decay: 0.0 -> 0.5)")):
        check_course(sealed, course(weight_decay=0.5))
