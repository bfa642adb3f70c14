r"""Write a study's results in the layout of PEFT's method comparison, a JSON file for each run, and a table.

python recipes/peft_metamathqa/board.py results/board-smollm2 results/smollm2-curve-sums-rivals \
    results/smollm2-curve-sums --before wikipedia

The folders are of published results: ``*.json.gz`` and ``training.json``. Forgetting is the loss on the text named by
``--before`` after training minus that before; each of our texts ends with an end token, PEFT's do not (forgetting.py
measures without). What was not measured is null. Fixed masks, which nothing trained, are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from maskft_common import files
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
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "maskft")


def main(out: Path, sources: list[Path], before: str) -> str:
    """Write the files; return the table."""
    read = [read_result(file) for source in sources for file in sorted(source.glob("*.json.gz"))]
    results = list({_name(result): result for result in read}.values())  # a run may stand in two folders
    trained = {run: summary for source in sources for run, summary in files.read_json(source / "training.json").items()}
    base = next(result for result in results if result["model"]["method"] == "pretrained")
    loss_before = _nll(base, before)
    lines = [
        "| method | seed | accuracy | forgetting | parameters trained | file (bytes) | training (s) | peak (GB) |",
        "| --- |" + " ---: |" * 7,
    ]
    for result in results:
        if result is base or not trained[result["study"]["run"]]["num_trainable"]:
            continue
        name = _name(result)
        record = experiment(result, trained[result["study"]["run"]], _nll(result, before) - loss_before)
        files.write_text(out / "results" / f"{name.replace('/', '--')}.json", json.dumps(record, indent=2) + "\n")
        info, last = record["train_info"], record["train_info"]["metrics"][-1]
        cells = [f"{last['test accuracy']:.3f}", f"{last['forgetting']:+.4f}", f"{info['num_trainable_params']:,}"]
        cells += [f"{info['file_size']:,}", f"{info['train_time']:.0f}"]
        cells += [f"{info['accelerator_memory_max'] / 1e9:.2f}"]
        lines.append(f"| {result['name']} | {result['model']['seed']} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    files.write_text(out / "table.md", table)
    return table


def experiment(result: Result, trained: dict[str, Any], forgetting: float) -> dict[str, Any]:
    """Return a run as PEFT's runner writes one."""
    settings, packages = result["study"]["settings"], result["environment"]["packages"]
    history = trained["history"]
    memory = [row["peak_memory_bytes"] for row in history if "peak_memory_bytes" in row]
    losses = [row["loss"] for row in history if "loss" in row]
    samples = trained["num_steps"] * settings["per_device_train_batch_size"]
    train_config = {name: settings.get(option) for name, option in _OPTIONS.items()} | {
        "model_id": result["study"]["model"],
        "dtype": result["settings"]["dtype"],
        "eval_steps": max(1, round(settings.get("eval_steps", 0.1) * trained["num_steps"])),
        "compile": False,
        "query_template": "{query}",
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": settings.get("learning_rate"), "weight_decay": settings.get("weight_decay", 0.0)},
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": result["settings"]["max_new_tokens"]},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }
    last = {
        "step": trained["num_steps"],
        "test accuracy": result["tasks"]["heldout"]["metrics"]["accuracy"]["value"],
        "train loss": losses[-1],
        "train samples": samples,
        "train total tokens": trained["num_train_tokens"],
        "forgetting": forgetting,
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
            "metrics": [{"step": row["step"], "train loss": row["loss"]} for row in history if "loss" in row] + [last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{name}-version": packages.get(name) for name in _PACKAGES},
            "system_info": {
                "system": result["environment"]["platform"],
                "processor": result["environment"]["cpu"],
                "accelerator": result["environment"].get("device", "cpu"),
            },
            "pytorch_info": packages["torch"],
        },
    }


def _peft_config(settings: dict[str, Any], method: str) -> dict[str, Any] | None:
    """What PEFT saves of the adapter; None: all weights were trained."""
    if method == "mask":
        options = {name: value for name, value in settings.items() if name.startswith("mask_") and name != "mask_seed"}
        config = {name.removeprefix("mask_"): value for name, value in options.items()}
        return {"peft_type": "MASK", "mask_seed": settings.get("mask_seed"), **config}
    return settings.get("peft_config")


def _name(result: Result) -> str:
    kind = result["model"]["method"].replace("full", "full-finetuning")
    return f"{kind}/{result['study']['run'].rpartition('-')[0]}"


def _nll(result: Result, before: str) -> float:
    return result["tasks"][f"{BEFORE}{before}"]["metrics"]["nll"]["value"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="gets results/*.json and table.md")
    parser.add_argument("sources", type=Path, nargs="+", help="folders of results")
    parser.add_argument("--before", required=True, help="probe whose loss says what was forgotten, e.g. wikipedia")
    args = parser.parse_args()
    print(main(args.out, args.sources, args.before), end="")
