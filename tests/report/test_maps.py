"""Maps of masks: every entry where it fits, else the share of each block."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from finished_study import MODULES
from maskft.adapter.mask_set import MaskSet
from maskft_base import files
from maskft_lab.cli.main import main
from maskft_lab.report.maps import block_side, mask_maps


def masks(*shapes, share=0.3):
    generator = torch.Generator().manual_seed(3)
    return {f"m{n}": torch.rand(shape, generator=generator) > share for n, shape in enumerate(shapes)}


def test_entry_by_entry():
    given = masks((5, 7), (4, 16))
    for mask, found in zip(given.values(), mask_maps(given), strict=True):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(found["data"]), np.uint8))[: mask.numel()]
        np.testing.assert_array_equal(bits.reshape(mask.shape).astype(bool), ~mask)
        assert (found["block"], found["size"]) == (1, list(mask.shape))
        assert found["share"] == pytest.approx(float((~mask).float().mean()))


def test_block_by_block_against_a_loop():
    given = masks((50, 70))
    (found,) = mask_maps(given, max_bytes=300)
    block, (rows, columns), removed = found["block"], found["size"], ~given["m0"].numpy()
    assert block > 1 and rows * columns <= 300
    levels = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(rows, columns)
    for i in range(rows):
        for j in range(columns):
            share = removed[i * block : (i + 1) * block, j * block : (j + 1) * block].mean()
            assert levels[i, j] / 255 * found["high"] == pytest.approx(share, abs=found["high"] / 500)


def test_maps_of_a_large_model_stay_small():
    shapes = [(4096, 4096)] * 128 + [(11008, 4096)] * 96
    block = block_side(shapes, 400_000)
    assert 300_000 < sum(-(-rows // block) * -(-columns // block) for rows, columns in shapes) <= 400_000


def test_inspect_writes_a_page_of_one_adapter(finished, tmp_path, capsys):
    adapter, file = finished / files.RUNS / "mask-s0", tmp_path / "mask.html"
    assert main(["inspect", str(adapter), "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    text = file.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    found = {each["name"]: each for each in data["maps"][0]["maps"]}
    for name, mask in MaskSet.from_adapter(adapter).items():
        assert name in MODULES and f"{100 * float((~mask).float().mean()):.2f}" in text
        bits = np.unpackbits(np.frombuffer(base64.b64decode(found[name]["data"]), np.uint8))[: mask.numel()]
        np.testing.assert_array_equal(bits.reshape(mask.shape).astype(bool), ~mask)
    assert "maskft analyze STUDY --what masks" in text
