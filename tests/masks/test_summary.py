"""Adapters in a table, and files of strangers that are read for it."""

import json
import stat
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from maskft import MaskConfig
from maskft.masks.mask_set import MaskSet, read_coded, read_config, weights_file
from maskft.masks.merge import load_masked, merge
from maskft.masks.summary import as_json, summarize, summary_lines
from maskft.masks.verify import verify
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS

MASK = torch.tensor([[True, False, True, True]])


def saved(tmp_path, names, **config):
    tiny.save_masks(dict.fromkeys(names, MASK), tmp_path / "adapter", **config)
    return tmp_path / "adapter"


def test_layers_share_a_row_and_come_in_their_order(tmp_path):
    names = [f"model.layers.{n}.mlp.{part}" for n in (10, 9, 1) for part in ("up_proj", "down_proj")] + ["head"]
    summary = summarize(saved(tmp_path, names, recipe={"seed": 3, "verdict": "better"}))
    assert [row["module"] for row in summary.modules][:3] == [
        "head",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert summary.modules[-1]["module"] == "model.layers.10.mlp.up_proj"
    lines = summary_lines(summary)
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "head",
        "model.layers.*.mlp.down_proj (3)",
        "model.layers.*.mlp.up_proj (3)",
    ]
    assert lines[6].split() == ["total", "28", "7", "25.00%", f"{8 * summary.total['num_bytes'] / 28:.3f}"]
    assert "on held-out rows: better" in lines and "made with: seed=3" in lines
    assert len(summary_lines(summary, all_modules=True)) == len(lines) + 4
    json.dumps(as_json(summary))


def test_an_empty_mask_of_a_large_model_is_read_and_not_unpacked(tmp_path):
    """Its matrices are headers alone: those of a 7B model claim 6.5 billion weights in 14 kB."""
    names = [f"model.layers.{n}.up_proj" for n in range(60)]
    tiny.save_masks(dict.fromkeys(names, torch.ones(1, 4, dtype=torch.bool)), tmp_path)
    file = tmp_path / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes().replace(struct.pack("<II", 1, 4), struct.pack("<II", 11008, 4096)))
    assert summarize(tmp_path).total["numel"] == 60 * 11008 * 4096
    with pytest.raises(UserError, match="in 3,840 bytes; so many are not unpacked without its base model"):
        MaskSet.from_adapter(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.\u00b2.up", "model.layers.\u0663.up", f"model.{'9' * 5000}.up", "\x1b[31m", "a" + "\u0301" * 300],
)
def test_names_of_modules_that_a_stranger_chose(name, tmp_path):
    """Superscripts are digits for ``str.isdigit`` and no numbers; int() of 5,000 digits raises."""
    summary = summarize(saved(tmp_path, [name, "model.layers.2.up"]))
    text = "\n".join(summary_lines(summary, all_modules=True))
    assert "\x1b" not in text and "\u0301" * 4 not in text


@pytest.mark.parametrize(
    "values",
    [
        {"revision": {}},
        {"revision": ["main"]},
        {"base_model_name_or_path": 3},
        {"removed_value_model": []},
        {"weights_sha256": [1]},
        {"recipe": [1]},
        {"base_fingerprint": "0" * 64 + ":3f"},
        {"progress": 2.0},
    ],
)
def test_values_of_another_type_are_one_line(values, tmp_path):
    folder = saved(tmp_path, ["up"], **values)
    for read in (read_config, summarize, load_masked, verify):
        with pytest.raises(UserError, match=f"{next(iter(values))}") as error:
            read(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_adapter_is_not_read(name, tmp_path):
    """merge would write its content as a plain file beside the weights, for the next upload."""
    folder = saved(tmp_path, ["up"])
    outside = tmp_path / "outside"
    if (folder / name).is_file():
        (folder / name).rename(outside)
    else:
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    for read in (summarize, read_coded, MaskSet.from_adapter, verify, load_masked):
        with pytest.raises(UserError, match="outside of its folder"):
            read(folder)
    with pytest.raises(UserError, match="outside of its folder"):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"has no adapter_model\.safetensors: copy the whole folder"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not a readable safetensors file"),
    ],
    ids=["missing", "cut"],
)
def test_masks_that_are_missing_or_cut_are_not_looked_for_on_the_hub(damage, message, tmp_path):
    """PEFT asks the hub for a missing file, under the path of the folder."""
    folder = saved(tmp_path, ["up"])
    damage(folder / "adapter_model.safetensors")
    for read in (summarize, read_coded, MaskSet.from_adapter, verify, load_masked):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_files_that_are_saved_have_one_mode(base, tmp_path):
    """safetensors' own is 0600, and another user's server could not read the weights beside their configuration."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), MaskConfig(task_type="CAUSAL_LM", layers_to_transform=[1])
    )
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    for folder in ("adapter", "merged"):
        files = [file for file in (tmp_path / folder).iterdir() if file.is_file()]
        assert len({stat.S_IMODE(file.stat().st_mode) for file in files}) == 1, files


def test_a_file_without_permission_is_not_called_missing(tmp_path, monkeypatch):
    """As safetensors calls it; adapters that were saved without maskft have files that only their owner can read."""
    folder = saved(tmp_path, ["up"])

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    # The superuser may read any file, so that taking the permission away shows nothing.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"is not a readable safetensors file: \[Errno 13\] Permission denied"):
        weights_file(folder)
