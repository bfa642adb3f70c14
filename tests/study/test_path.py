"""Paths: every trained method measured between the base model and the end of training."""

import json

import pytest

from maskft_base import files
from maskft_lab.cli.main import main
from small_study import recipe, write

LORA = {"method": "peft", "peft_config": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}
STEPS = {"max_steps": 4, "eval_steps": 0.5, "save_steps": 0.5}


@pytest.fixture
def study(base, data, tmp_path):
    methods = {
        "base": {"method": "pretrained"},
        "full": {"method": "full", **STEPS, "tune": {"learning_rate": [1.0e-3, 3.0e-3]}},
        "LoRA": {**LORA, **STEPS, "learning_rate": 1.0e-2},
        "mask": {"method": "mask", **STEPS, "learning_rate": 1.0e-2},
    }
    content = recipe(base, data, methods)
    test = tmp_path / "test.jsonl"
    test.write_text(
        "".join(json.dumps({"prompt": f"{n}*1=", "completion": str(n), "answer": str(n)}) + "\n" for n in range(6))
    )
    content["evaluation"] = {"heldout": {"dataset_name": str(test)}, "max_new_tokens": 2, "bf16": True}
    probe = {"dataset_name": str(test), "max_eval_samples": 5}
    content["path"] = {
        "checkpoints": [0.5, 1.0],
        "scales": [0.5],
        "before": {"kl": {**probe, "kl": True}, "text": probe},
    }
    return write(tmp_path, content)


def test_every_point_is_measured_on_heldout_rows_and_probes(study, tmp_path):
    out = tmp_path / "study"
    assert main(["study", str(study), "--output_dir", str(out)]) == 0
    for folder in (out / files.RUNS).iterdir():
        points = {
            p.parent.name: json.loads(p.read_text())["tasks"]["heldout"] for p in folder.glob("path/kl/*/result.json")
        }
        assert set(points) == ({"0-0"} if folder.name.startswith("base") else {"0.5-1", "1-1", "1-0.5"}), folder
        kl = {name: task["metrics"]["kl"]["value"] for name, task in points.items()}
        if folder.name.startswith("base"):
            assert kl == {"0-0": 0}
        else:
            assert 0 < kl["1-0.5"] < kl["1-1"] and kl["0.5-1"] != kl["1-1"]
            assert len(list(folder.glob("checkpoint-*"))) == 2
