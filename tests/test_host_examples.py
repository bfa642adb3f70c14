"""examples/hosts, by the hosts' own commands: 4 steps on the CPU and a resume from step 2, where they are installed."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskft import MaskConfig
from maskft.adapter.verify import verify

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "examples" / "hosts"
MASK = {"sparsity": 0.3, "init_scores": "normal"}
RAMP = {**MASK, "sparsity_ramp": 0.5}  # removes 30 % at the end only if the host reports the progress of training
QUIET = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
SETTINGS = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "bf16": False, "micro_batch_size": 2}


def needs(module):
    reason = f"{module} is not installed: docs/compatibility.md"
    return pytest.mark.skipif(find_spec(module) is None, reason=reason)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"{n}+1=", "output": str(n + 1)}) for n in range(16)))
    return file


def run(folder, *command, **environment):
    environment = os.environ | QUIET | environment
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def check(whole, resumed, base):
    """The adapter is intact and fits the base, 30 % are removed, and a resumed run gives the same bits."""
    assert float(re.search(r"\((\S+)%\)", "\n".join(verify(whole, str(base))))[1]) == pytest.approx(30, abs=0.2)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("file", sorted(HOSTS.glob("*.py")), ids=lambda file: file.stem)
def test_is_short_and_compiles(file):
    compile(file.read_text(), file.name, "exec")
    assert len(file.read_text().splitlines()) <= 80


@pytest.mark.slow
@needs("axolotl")
def test_axolotl(base, rows, tmp_path):
    settings = SETTINGS | {
        "base_model": str(base),
        "plugins": ["axolotl_mask.MaskPlugin"],
        "adapter": "mask",
        "mask": RAMP,
        "peft_layers_to_transform": [1, 2],
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "alpaca"}],
        "sequence_len": 256,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "attn_implementation": "eager",
    }

    def train(name, **more):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / name), **more}))
        path = os.pathsep.join([str(HOSTS), os.environ.get("PYTHONPATH", "")])
        run(tmp_path, "-m", "axolotl.cli.main", "train", file, "--launcher", "python", PYTHONPATH=path)

    train("whole")
    train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    check(tmp_path / "whole", tmp_path / "resumed", base)


@pytest.mark.slow
@needs("swift")
def test_ms_swift(base, rows, tmp_path):
    options = f"--tuner_type mask --external_plugins {HOSTS}/ms_swift_mask.py --callbacks mask --model {base}"
    options += f" --model_type llama --template chatml --dataset {rows} --split_dataset_ratio 0 --torch_dtype float32"
    options += " --max_length 256 --max_steps 4 --save_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2"
    options += " --gradient_accumulation_steps 1 --lr_scheduler_type constant --add_version false --check_model false"
    options += " --report_to none"

    def train(name, *more):
        command = ["-m", "swift.cli.main", "sft", *options.split(), "--output_dir", tmp_path / name, *more]
        run(tmp_path, *command, MASKFT=json.dumps({**RAMP, "layers_to_transform": [1, 2]}))

    train("whole")
    train("resumed", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2")
    check(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4", base)


@pytest.mark.slow
@needs("llamafactory")
def test_llama_factory(base, rows, tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"sums": {"path": str(rows), "source": "local", "converter": "alpaca"}}))
    settings = SETTINGS | {
        "model": str(base),
        "template": "qwen3_nothink",
        "train_dataset": str(data),
        "global_batch_size": 2,
        "cutoff_len": 256,
        "batching_workers": 0,
        "peft_config": {"name": "mask", "layers_to_transform": [1, 2], **MASK},
    }

    def train(name, **more):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / name), **more}))
        run(tmp_path, HOSTS / "llama_factory_mask.py", "sft", file)

    train("whole")
    train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    check(tmp_path / "whole", tmp_path / "resumed", base)


@pytest.mark.slow
def test_lm_eval_reads_an_adapter_by_the_documented_line(base, tmp_path):
    """It scores a task as the merged model does."""
    masked = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MaskConfig(sparsity=0.3)).eval()
    masked.save_pretrained(tmp_path / "mask")
    row = {"question": "3+1=", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which YAML contains
    [line] = re.findall(r"```sh\n(python .*?)```", (ROOT / "docs" / "compatibility.md").read_text(), re.DOTALL)
    names = {"your-name/your-model": str(base), "runs/mask": str(tmp_path / "mask"), "gsm8k": "sums", "\\\n": " "}
    for name, ours in names.items():
        assert name in line
        line = line.replace(name, ours)
    more = ["--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out", "--log_samples"]
    run(tmp_path, *shlex.split(line)[1:], *more, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    [samples] = (tmp_path / "out").rglob("samples_sums_*.jsonl")

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in row.values())
    logits = masked.merge_and_unload()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
    assert float(json.loads(samples.read_text())["filtered_resps"][0][0]) == pytest.approx(float(expected), rel=1e-4)
