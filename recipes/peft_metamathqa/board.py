r"""Write a study's results in the layout of PEFT's method comparison, a JSON file for each run, and a table.

python recipes/peft_metamathqa/board.py results/board-smollm2 results/smollm2-curve-sums-rivals \
    results/smollm2-curve-sums --before wikipedia

The folders are of published results: ``*.json.gz`` and ``training.json``. Forgetting is the loss on the text named by
``--before`` after training minus that before; each of our texts ends with an end token, PEFT's do not (forgetting.py
measures without). Numbers that were not measured are null. Fixed masks are left out, because nothing was trained. Lines
above an existing table stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from maskft_common import files
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_lab.results.schema import BEFORE, Result, read_result

# train_config of PEFT's runner -> option of maskft train, where they have the same meaning.
_OPTIONS = {
    "max_seq_length": "max_length",
    "batch_size": "per_device_train_batch_size",
    "batch_size_eval": "per_device_eval_batch_size",
    "max_steps": "max_steps",
    "use_gc": "gradient_checkpointing",
    "seed": "seed",
    "lr_scheduler": "lr_scheduler_type",
    "use_amp": "bf16",
}
# Versions that PEFT's runner records.
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "maskft")


def main(out: Path, sources: list[Path], before: str) -> str:
    """Write the files; return the table."""
    results = {}  # by name, because two folders may have the same run
    trained = {}  # run -> its training
    for source in sources:
        for file in sorted(source.glob("*.json.gz")):
            result = read_result(file)
            if "study" not in result:
                raise UserError(f"{file} is of no study; name a folder of a study's published results")
            results[_name(result)] = result
        trained |= files.read_json(source / "training.json")

    # Any of the pre-trained results: it is the same model in all folders.
    base = next((result for result in results.values() if result["model"]["method"] == "pretrained"), None)
    if base is None:
        raise UserError(f"no result of the model before training in {', '.join(map(str, sources))}")
    loss_before = _nll(base, before)
    lines = [
        "| method | seed | accuracy | forgetting | parameters trained | file (bytes) | training (s) | peak (GB) |",
        "| --- |" + " ---: |" * 7,
    ]
    texts = {}  # file -> content
    for name, result in results.items():
        if result is base:
            continue
        training = trained.get(result["study"]["run"])
        if training is None:
            raise UserError(f"no training.json of the folders has {result['study']['run']}: publish its study again")
        if not training["num_trainable"]:
            continue  # a fixed mask
        record = experiment(result, training, _nll(result, before) - loss_before)
        file_name = name.replace("/", "--") + ".json"
        texts[out / "results" / file_name] = json.dumps(record, indent=2) + "\n"

        info = record["train_info"]
        last = info["metrics"][-1]
        cells = [
            result["name"],
            f"{result['model']['seed']}",
            f"{last['test accuracy']:.3f}",
            f"{last['forgetting']:+.4f}",
            f"{info['num_trainable_params']:,}",
            f"{info['file_size']:,}",
            f"{info['train_time']:.0f}",
            f"{info['accelerator_memory_max'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"

    file = out / "table.md"
    head = ""
    if file.is_file():
        # The lines that a person wrote above the table stay.
        head, _, _ = file.read_text(encoding="utf-8").partition("| method |")
    texts[file] = head + table
    # At the end: a run that is missing must not leave a part of a board.
    for path, text in texts.items():
        files.write_text(path, text)
    return table


def experiment(
    result: Result,
    trained: dict[str, Any],
    forgetting: float,
) -> dict[str, Any]:
    """Return a run as PEFT's runner writes one."""
    settings = result["study"]["settings"]
    environment = result["environment"]
    packages = environment["packages"]
    history = trained["history"]
    num_steps = trained["num_steps"]
    rows_per_step = settings.get("global_batch_size")
    if rows_per_step is None:
        rows_per_step = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)

    # PEFT's processing.py expects whole numbers of bytes.
    memory = [row["peak_memory_bytes"] for row in history if "peak_memory_bytes" in row]
    losses = []
    for row in history:
        if "loss" in row:
            losses.append({"step": row["step"], "train loss": row["loss"]})
    last = {
        "step": num_steps,
        "test accuracy": result["tasks"]["heldout"]["metrics"]["accuracy"]["value"],
        "train loss": losses[-1]["train loss"],
        "train samples": num_steps * rows_per_step,
        "train total tokens": trained["num_train_tokens"],
        "forgetting": forgetting,
    }

    # PEFT's names for the same options, and fixed values for those that maskft train does not have. `eval_steps` of
    # maskft train is a number of steps, or below 1 a share of all.
    eval_steps = settings.get("eval_steps", 0.1)
    if eval_steps < 1:
        eval_steps = round(eval_steps * num_steps)
    train_config = {name: settings.get(option) for name, option in _OPTIONS.items()}
    train_config |= {
        "model_id": result["study"]["model"],
        "dtype": result["settings"]["dtype"],
        "eval_steps": max(1, int(eval_steps)),
        "compile": False,
        "query_template": "{query}",
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": settings.get("learning_rate"),
            "weight_decay": settings.get("weight_decay", 0.0),
        },
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": result["settings"]["max_new_tokens"]},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }
    return {
        "run_info": {
            "created_at": result["created"],
            "total_time": trained["train_time_s"],
            "experiment_name": _name(result),
            "peft_branch": None,
            "peft_worktree_is_dirty": None,
            "train_config": train_config,
            "peft_config": _peft_config(settings, trained["method"]),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": sum(memory) // len(memory),
            "accelerator_memory_max": trained["peak_memory_bytes"],  # of the process
            "accelerator_memory_reserved_99th": max(memory),
            "train_time": trained["train_time_s"],
            "file_size": result["model"]["num_bytes"],  # in bfloat16, masks coded; PEFT's are as saved
            "num_trainable_params": trained["num_trainable"],
            "num_total_params": None,
            "status": "success",
            "metrics": [*losses, last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{name}-version": packages.get(name) for name in _PACKAGES},
            "system_info": {
                "system": environment["platform"],
                "processor": environment["cpu"],
                "accelerator": environment.get("device", "cpu"),
            },
            "pytorch_info": packages["torch"],
        },
    }


def _peft_config(settings: dict[str, Any], method: str) -> dict[str, Any] | None:
    """The configuration that PEFT saves with the adapter; None if all weights were trained."""
    if method != "mask":
        return settings.get("peft_config")

    # Options of maskft train are the fields of MaskConfig with a prefix, but for `mask_seed`, which has it itself.
    config = {"peft_type": "MASK", "mask_seed": settings.get("mask_seed")}
    for name, value in settings.items():
        if name.startswith("mask_") and name != "mask_seed":
            config[name.removeprefix("mask_")] = value
    return config


def _name(result: Result) -> str:
    """The name of an experiment in PEFT's comparison: its method, and the run, which ends with its hash, without it."""
    kind = result["model"]["method"].replace("full", "full-finetuning")
    run, _, _ = result["study"]["run"].rpartition("-")
    return f"{kind}/{run}"


def _nll(result: Result, before: str) -> float:
    probe = result["tasks"].get(f"{BEFORE}{before}")
    if probe is None:
        probes = [name.removeprefix(BEFORE) for name in result["tasks"] if name.startswith(BEFORE)]
        raise UserError(f"{result['name']} has no probe {before!r}; there are: {', '.join(probes) or 'none'}")
    return probe["metrics"]["nll"]["value"]


def command() -> None:
    """Write the board of the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="gets results/*.json and table.md")
    parser.add_argument("sources", type=Path, nargs="+", help="folders of results")
    parser.add_argument("--before", required=True, help="probe whose loss measures forgetting, e.g. wikipedia")
    args = parser.parse_args()
    print(main(args.out, args.sources, args.before), end="")


if __name__ == "__main__":
    run_script(command)
