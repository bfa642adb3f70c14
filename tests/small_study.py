"""A study small enough to be run again and again, and everything that it leaves."""

import json

import yaml

from maskft_common import layout


def replace_commands(monkeypatch, call):
    """Each command of a study becomes ``call(words, log)`` in this process, which saves a start of Python."""

    def run_command(words, log, tick, lock_fd, num_threads=None):
        call(words, log)

    for module in ("prepare", "study"):
        monkeypatch.setattr(f"maskft_lab.study.{module}.run_command", run_command)


def recipe(base, data, methods):
    return {
        "version": 1,
        "name": "small",
        "model": str(base),
        "data": {"sums": {"dataset_name": str(data), "eval_split_size": 16}},
        "train": {
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_steps": 3,
            "save_steps": 3,
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
        },
        "methods": methods,
        "evaluation": {"heldout": {"dataset_name": str(data), "max_eval_samples": 20}, "max_new_tokens": 2},
    }


FULL = {"method": "full", "num_train_epochs": 2, "last": "continued"}
MASK = {"method": "mask", "from": "full", "num_train_epochs": 1, "last": "complete"}


def write(folder, content):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def outcome(folder, name="small"):
    """Everything a study leaves for tables, without times, and the weights it ends with."""
    out = {}
    for file in sorted(folder.glob(f"{layout.RESULTS}/*/{layout.RESULT}")):
        result = json.loads(file.read_text())
        del result["created"]
        out[file.parent.name] = result
    for file in sorted(folder.glob(f"{layout.RUNS}/*/{layout.RUN}")):
        record = json.loads(file.read_text())
        del record["train_time_s"], record["peak_memory_bytes"]
        record["files"] = {name: sha for name, sha in record["files"].items() if name.endswith(".safetensors")}
        out[f"{file.parent.name} record"] = record
    for file in sorted(folder.glob(f"{layout.RUNS}/**/*.safetensors")):
        out[str(file.relative_to(folder))] = file.read_bytes()
    out["summary"] = (folder / layout.SUMMARY.format(name)).read_text()
    out["table"] = (folder / layout.STUDY_TABLE.format(name)).read_text()
    return out
