"""Plugins for other trainers (maskft.axolotl, examples/hosts), where installed as docs/compatibility.md says."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from maskft.masks.verify import verify

pytestmark = pytest.mark.slow
MASK = {"sparsity": 0.3, "init_scores": "normal"}
MOVING = {**MASK, "sparsity_ramp": 0.5}
HOSTS = Path(__file__).parents[1] / "examples" / "hosts"
QUIET = {
    "PYTHONPATH": os.pathsep.join([str(HOSTS), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
}


def needs(module):
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f"{module} is not installed, docs/compatibility.md says how"
    )


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"{n}+1=", "output": str(n + 1)}) for n in range(16)))
    return file


def run(folder, *command, **environment):
    """Exit status and output of Python with these arguments, in a folder."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | QUIET | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def removed(folder, base):
    """Percentage that a mask removes, which verify has found to be whole and of this base."""
    return float(re.search(r"\((\S+)%\)", "\n".join(verify(folder, str(base))))[1])


def is_same_adapter(one, other):
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@needs("axolotl")
def test_axolotl_trains_and_resumes(base, rows, tmp_path):
    settings = {
        "base_model": str(base), "plugins": ["maskft.axolotl.MaskPlugin"], "adapter": "mask", "mask": MOVING,
        "peft_layers_to_transform": [1, 2], "datasets": [{"path": str(rows), "ds_type": "json", "type": "alpaca"}],
        "sequence_len": 256, "micro_batch_size": 2, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "bf16": False, "attn_implementation": "eager",
    }  # fmt: skip

    def train(name, **more):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / name), **more}))
        return run(tmp_path, "-m", "axolotl.cli.main", "train", file, "--launcher", "python")

    status, output = train("whole")
    assert status == 0, output
    # The ramp has ended: the host told the mask how far training was.
    assert removed(tmp_path / "whole", base) == pytest.approx(30, abs=0.2)
    status, output = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert status == 0, output
    assert is_same_adapter(tmp_path / "whole", tmp_path / "resumed")


@needs("swift")
def test_ms_swift_trains_and_resumes(base, rows, tmp_path):
    plugin = HOSTS / "maskft_ms_swift.py"
    options = f"--tuner_type mask --external_plugins {plugin} --model {base} --model_type llama --template chatml"
    options += f" --dataset {rows} --split_dataset_ratio 0 --torch_dtype float32 --max_length 256 --max_steps 4"
    options += " --save_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-2"
    options += " --lr_scheduler_type constant --add_version false --check_model false --report_to none"
    given = json.dumps({**MOVING, "layers_to_transform": [1, 2]})

    def train(name, *more):
        command = ["-m", "swift.cli.main", "sft", *options.split(), "--output_dir", tmp_path / name, *more]
        return run(tmp_path, *command, MASKFT=given)

    status, output = train("whole", "--callbacks", "mask")
    assert status == 0, output
    last = tmp_path / "whole" / "checkpoint-4"
    assert removed(last, base) == pytest.approx(30, abs=0.2)
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"]
    status, output = train("resumed", *resume, "--callbacks", "mask")
    assert status == 0, output
    assert is_same_adapter(last, tmp_path / "resumed" / "checkpoint-4")
    status, output = train("alone")
    assert status != 0 and "this mask depends on how far training is" in output


@needs("llamafactory")
def test_llama_factory_trains_and_resumes(base, rows, tmp_path):
    start = "import maskft_llama_factory; from llamafactory.v1.launcher import launch; launch()"
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"sums": {"path": str(rows), "source": "local", "converter": "alpaca"}}))
    settings = {
        "model": str(base), "template": "qwen3_nothink", "train_dataset": str(data), "micro_batch_size": 2,
        "global_batch_size": 2, "cutoff_len": 256, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "bf16": False, "batching_workers": 0,
    }  # fmt: skip

    def train(name, mask, **more):
        file = tmp_path / f"{name}.yaml"
        peft_config = {"name": "mask", "layers_to_transform": [1, 2], **mask}
        file.write_text(
            yaml.safe_dump({**settings, "output_dir": str(tmp_path / name), "peft_config": peft_config, **more})
        )
        return run(tmp_path, "-c", start, "sft", file)

    status, output = train("whole", MASK)
    assert status == 0, output
    assert removed(tmp_path / "whole", base) == pytest.approx(30, abs=0.2)
    status, output = train("resumed", MASK, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert status == 0, output
    assert is_same_adapter(tmp_path / "whole", tmp_path / "resumed")
    status, output = train("moving", MOVING)
    assert status != 0 and "this mask depends on how far training is" in output
