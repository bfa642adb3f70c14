"""How much of a fine-tuning is left when it is stored in four bits: a deletion mask, LoRA and all weights.

python recipes/smollm2/exact_in_four_bits.py runs/curve runs/four_bits --seeds 0
python recipes/smollm2/exact_in_four_bits.py --table results/smollm2-exact-in-four-bits

Inputs in runs/curve: make_curve_inputs.py, and for sums ../small/make_inputs.py. The base is SmolLM2-135M-Instruct with
its 210 linear layers held as GGUF's Q4_0 (quantised once; that is the base; ``--type Q8_0`` for eight bits, ``NF4`` for
bitsandbytes' four). Each method trains over what the blocks hold, and is measured

- as trained (LoRA: the adapter unmerged),
- merged and stored on the base's grid: its scales, the nearest codes,
- merged and quantised again: fresh scales,

and once more trained over the float weights, merged there and then quantised. Rates and weights of KL are those of
study_curve_banking77_kl_seeds.yaml and study_curve_sums_rivals.yaml. Accuracy: share of test messages whose every
answer token is the likeliest, teacher-forced. Forgetting: nats a token on two probes, above the base that was trained
over, or, once a model is stored, above the stored base. About 40 minutes of one core with bfloat16 instructions for a
task and a seed, 7 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from grids import TYPES, BlockGrid, NF4Grid, grid_of

import maskft_lab
from maskft.data.arguments import DataArguments
from maskft.data.tokenizing import IGNORED, tokenize_example
from maskft.loss import length_sorted_batches, mean_nll, nll_per_item, pad
from maskft.masks.mask_set import MaskSet
from maskft.masks.merge import load_masked
from maskft.models import load_model, load_tokenizer
from maskft_common.layout import EMBEDDED_MODEL, TRAINING, holds_adapter
from maskft_lab.cli.main import main as maskft
from maskft_lab.evaluation.heldout import heldout_rows
from maskft_lab.results.statistics import Bootstrap, as_block

READY = Path(maskft_lab.__file__).parent / "ready" / "intents"
NUM_TEST = 200
NUM_PROBE = 24
BATCH = 25
PROBES = ("instructions", "wikipedia")

MASK = [
    *("--method", "mask", "--mask_selection", "logit", "--mask_gradient", "sigmoid"),
    *("--mask_target_modules", "gate_proj", "--mask_init_scores", "magnitude", "--mask_init_std", "0.02"),
    *("--mask_init_value", "0.04", "--mask_sharpness", "10", "--mask_sharpness_end", "100", "--mask_price", "1"),
]
LORA = [
    *("--method", "peft"),
    *("--peft_config", '{"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}'),
]
FULL = ["--method", "full"]
METHODS = {"deletion mask": MASK, "LoRA r 16": LORA, "full": FULL}
# Rate and weight of KL that held-out rows chose over the float base.
RATES = {
    "intents": {
        "deletion mask": ["--learning_rate", "5e-3", "--kl_to_base", "0.1"],
        "LoRA r 16": ["--learning_rate", "5e-3", "--kl_to_base", "0.03"],
        "full": ["--learning_rate", "4e-4", "--kl_to_base", "0.03"],
    },
    "sums": {
        "deletion mask": ["--learning_rate", "3e-3", "--kl_to_base", "0.03"],
        "LoRA r 16": ["--learning_rate", "1e-3", "--kl_to_base", "0.1"],
        "full": ["--learning_rate", "1e-4", "--kl_to_base", "0.03"],
    },
}

TRAIN = [
    *("--as_chat", "false", "--lr_scheduler_type", "linear", "--bf16", "true", "--gradient_checkpointing", "false"),
    # The last step is measured (kl_budget.py changes that), so held-out rows only say whether training went well.
    *("--eval_on_start", "false", "--save_only_model", "true"),
    *("--max_eval_samples", "24", "--keep_worse", "true"),
    *("--logging_steps", "8", "--report_to", "none", "--dtype", "float32"),
]
TASKS = {
    "intents": {
        "files": ("banking77_train.jsonl.gz", "banking77_test.jsonl.gz"),
        "options": [
            *("--eval_split_size", "150", "--max_steps", "48", "--per_device_train_batch_size", "16"),
            *("--eval_steps", "48", "--save_steps", "48"),
            *("--per_device_eval_batch_size", "50", "--max_length", "64"),
        ],
    },
    "sums": {
        "files": ("sums_train.jsonl.gz", "sums_test.jsonl.gz"),
        "options": [
            *("--eval_split_size", "200", "--max_steps", "64", "--per_device_train_batch_size", "32"),
            *("--eval_steps", "64", "--save_steps", "64"),
            *("--per_device_eval_batch_size", "100", "--max_length", "32"),
        ],
    },
}


# The grid


def linear_weights(model) -> dict[str, torch.Tensor]:
    """Weights of the linear layers of all blocks, by name; what is held in four bits."""
    return {
        f"{name}.weight": module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def store(model, how: str, grid: BlockGrid | NF4Grid, scales: dict[str, torch.Tensor]) -> int:
    """Replace the linear weights by what a grid of grids.py holds of them; returns how many values differ."""
    num_differ = 0
    for name, weight in linear_weights(model).items():
        if how == "fresh scales":
            stored = grid.fresh(weight)
        else:
            stored = grid.nearest(weight, scales[name])
        num_differ += int((stored != weight).sum())
        weight.copy_(stored)
    return num_differ


# Measuring


@dataclass
class Test:
    """Tokenised test rows, and what measures a model on them."""

    rows: list[dict]
    probes: dict[str, list[dict]]
    pad_token_id: int

    @torch.inference_mode()
    def measure(self, model) -> dict:
        """Accuracy, loss (nats a token), for each row whether it is right, and nats a token on the probes."""
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            probes = {name: mean_nll(nll_per_item(model, rows)) for name, rows in self.probes.items()}
        right = [0] * len(self.rows)
        total_loss = 0.0
        num_tokens = 0
        for places in length_sorted_batches([len(row["input_ids"]) for row in self.rows], BATCH):
            ids_BT, mask_BT = pad([self.rows[place]["input_ids"] for place in places], self.pad_token_id, "cpu")
            labels_BT, _ = pad([self.rows[place]["labels"] for place in places], IGNORED, "cpu")
            with torch.autocast("cpu", torch.bfloat16):
                logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            targets_BT = labels_BT[:, 1:]
            is_right_BT = (logits_BTV.argmax(-1) == targets_BT) | (targets_BT == IGNORED)
            for place, is_right in zip(places, is_right_BT.all(1).tolist(), strict=True):
                right[place] = int(is_right)
            supervised = targets_BT != IGNORED
            losses = torch.nn.functional.cross_entropy(
                logits_BTV[supervised].float(), targets_BT[supervised], reduction="sum"
            )
            total_loss += float(losses)
            num_tokens += int(supervised.sum())
        return {
            "accuracy": sum(right) / len(right),
            "loss": total_loss / num_tokens,
            "probes": probes,
            "right": right,
        }


def load_test(data_dir: Path, task: str) -> Test:
    """The first test rows of a task, and of the probes of forgetting."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)

    def rows_of(file: str, num_rows: int) -> list[dict]:
        arguments = DataArguments(dataset_name=str(data_dir / file), as_chat=False, max_eval_samples=num_rows)
        rows = heldout_rows(arguments, None, tokenizer)
        return [tokenize_example(row, tokenizer, max_length=192) for row in rows]

    probes = {name: rows_of(f"{name}_report.jsonl.gz", NUM_PROBE) for name in PROBES}
    return Test(rows_of(TASKS[task]["files"][1], NUM_TEST), probes, tokenizer.pad_token_id)


# Training


def make_bases(folder: Path, type_name: str) -> dict[str, Path]:
    """Write the float base, and the one that blocks hold, as ordinary checkpoints."""
    bases = {"float": folder / "base-float", type_name: folder / f"base-{type_name.lower()}"}
    for name, path in bases.items():
        if (path / "config.json").is_file():
            continue
        model = load_model(EMBEDDED_MODEL, "float32")
        if name == type_name:
            grid = grid_of(type_name)
            for weight in linear_weights(model).values():
                weight.copy_(grid.fresh(weight))
        load_tokenizer(EMBEDDED_MODEL).save_pretrained(path)
        model.save_pretrained(path)
    return bases


def train(base: Path, data_dir: Path, task: str, method: str, seed: int, folder: Path) -> Path:
    """Train a method over a base with ``maskft train``, unless that is done."""
    if not (folder / TRAINING).is_file():
        words = ["train", *METHODS[method], *RATES[task][method], *TRAIN, *TASKS[task]["options"]]
        words += ["--model_name_or_path", str(base), "--dataset_name", str(data_dir / TASKS[task]["files"][0])]
        words += ["--seed", str(seed), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        if status := maskft(words):
            sys.exit(status)
    return folder


def trained(base: Path, folder: Path, method: str, is_merged: bool = True):
    """A trained model, its adapter merged in float32."""
    if not holds_adapter(folder):
        return load_model(str(folder), "float32")
    if method == "deletion mask":
        model = load_masked(folder, str(base), "float32")[0]
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(str(base), "float32"), str(folder))
    return model.merge_and_unload() if is_merged else model


# One task and seed


def run(args, task: str, seed: int) -> None:
    """Train and measure all methods; writes one JSON file, again after each."""
    work, results = args.work, args.results
    type_name = args.type
    bases = make_bases(work, type_name)
    test = load_test(args.data_dir, task)
    file = results / f"{task}-{type_name}-seed{seed}.json"
    results.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    done = {(row["method"], row["trained_over"], row["stored"]) for row in rows}

    def add(method: str, over: str, stored: str, model, num_differ: int | None) -> None:
        row = {"method": method, "trained_over": over, "stored": stored, "num_differ": num_differ}
        rows.append(row | test.measure(model))
        print(f"{task} seed {seed}: {method} over {over}, {stored}: {rows[-1]['accuracy']:.1%}, "
              f"loss {rows[-1]['loss']:.4f}, {num_differ} values differ", flush=True)  # fmt: skip
        content = {"task": task, "type": type_name, "seed": seed, "num_linear": num_linear, "rows": rows}
        file.write_text(json.dumps(content) + "\n")

    grid = grid_of(type_name)
    base_model = load_model(str(bases[type_name]), "float32")
    scales = {name: grid.scales(weight) for name, weight in linear_weights(base_model).items()}
    num_linear = sum(weight.numel() for weight in linear_weights(base_model).values())
    if ("none", type_name, "as trained") not in done:
        add("none", type_name, "as trained", base_model, 0)
    del base_model
    if ("none", "float", "as trained") not in done:
        add("none", "float", "as trained", load_model(str(bases["float"]), "float32"), None)

    for over in (type_name, "float"):
        for method in METHODS:
            stores = ("as trained", "base's grid", "fresh scales")
            if over == "float":
                # The base's grid has nothing to do with what was trained over other values.
                stores = ("as trained", "fresh scales")
            if all((method, over, stored) in done for stored in stores):
                continue
            folder = work / f"{task}-{over}-{method}-{seed}".replace(" ", "-")
            train(bases[over], args.data_dir, task, method, seed, folder)
            for stored in stores:
                if (method, over, stored) in done:
                    continue
                model = trained(bases[over], folder, method, is_merged=stored != "as trained")
                num_differ = None if stored == "as trained" else store(model, stored, grid, scales)
                add(method, over, stored, model, num_differ)
                del model


def run_ready(args) -> None:
    """Measure the mask of intents that maskft brings, trained over float weights, on its way into blocks."""
    results = args.results
    type_name = args.type
    bases = make_bases(args.work, type_name)
    test = load_test(args.data_dir, "intents")
    results.mkdir(parents=True, exist_ok=True)
    rows = []

    def add(stored: str, model, num_differ: int | None) -> None:
        row = {"method": "ready mask", "trained_over": "float", "stored": stored, "num_differ": num_differ}
        rows.append(row | test.measure(model))
        print(f"ready mask, {stored}: {rows[-1]['accuracy']:.1%}, loss {rows[-1]['loss']:.4f}", flush=True)
        content = {"task": "intents", "type": type_name, "seed": "ready", "num_linear": num_linear, "rows": rows}
        (results / f"intents-{type_name}-seed-ready.json").write_text(json.dumps(content) + "\n")

    masks = MaskSet.from_adapter(READY)
    model = load_model(str(bases["float"]), "float32")
    num_linear = sum(weight.numel() for weight in linear_weights(model).values())
    masks.apply_(model)
    add("as trained", model, None)
    add("fresh scales", model, store(model, "fresh scales", grid_of(type_name), {}))

    # The zero codes of the mask in the base's own blocks: what merging with --accept_other_base does.
    model = load_model(str(bases[type_name]), "float32")
    masks.apply_(model)
    add(f"zero codes in the base's {type_name}", model, 0)


# The table

TABLE_HEAD = [
    "# Exact in four bits: how much of a fine-tuning is left when it is stored on the base's grid",
    "",
    "What: a deletion mask, LoRA r 16 and full fine-tuning with a KL penalty, trained over a base held in GGUF blocks",
    "and over float weights; as trained, merged and stored.",
    "Recipe: `recipes/smollm2/exact_in_four_bits.py`; rates and KL weights are those that held-out rows chose over the",
    "float base, in `study_curve_banking77_kl_seeds.yaml` and, for sums, `study_curve_sums_rivals.yaml`.",
    "Machine: AMD EPYC, one core, bfloat16 autocast. Answers: the JSON files beside this page.",
    "",
]


def table(results: Path) -> str:
    """Markdown of all tasks, types and seeds in a folder; means over the seeds."""
    runs = [json.loads(file.read_text()) for file in sorted(results.glob("*-seed*.json"))]
    lines = []
    for task, type_name, is_ready in dict.fromkeys(_group(run) for run in runs):
        lines += _table_of([run for run in runs if _group(run) == (task, type_name, is_ready)])
    return "\n".join([*TABLE_HEAD, *lines])


def _group(run: dict) -> tuple[str, str, bool]:
    return run["task"], run["type"], run["seed"] == "ready"


def _table_of(runs: list[dict]) -> list[str]:
    """Lines of one table: the runs of a task and a type."""
    first = runs[0]
    found: dict[tuple, list[dict]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault((row["method"], row["trained_over"], row["stored"]), []).append(row)
    trained = {key[:2]: rows for key, rows in found.items() if key[2] == "as trained"}
    # Bonferroni: all differences of a table are covered together.
    num_differences = sum(key[2] != "as trained" for key in found)
    confidence = 1 - 0.05 / max(num_differences, 1)

    lines = [
        f"{first['task']}, {first['type']}, {NUM_TEST} test rows, seed {', '.join(str(run['seed']) for run in runs)}; "
        f"{first['num_linear']:,} weights in {first['type']}. Simultaneous 95 % intervals over "
        f"{'seeds and test rows' if len(runs) > 2 else 'test rows, about these models'}. Stored models are compared "
        "with the stored base in what they forget, others with the base that was trained over.",
        "",
        "| method | trained over | stored | accuracy % | stored - as trained, points | loss | "
        "instructions, nats | text, nats | values that differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, over, stored), rows in found.items():
        cells = [method, over, stored, f"{100 * _mean(row['accuracy'] for row in rows):.1f}"]
        before = trained.get((method, over))
        is_comparable = stored != "as trained" and before is not None and len(before) == len(rows)
        cells.append(difference(before, rows, confidence) if is_comparable else "")
        cells.append(f"{_mean(row['loss'] for row in rows):.4f}")
        # A stored model is compared with the stored base, one as trained with the base that it was trained over.
        base = found.get(("none", over if stored == "as trained" else first["type"], "as trained"))
        for probe in PROBES:
            cells.append("" if base is None else f"{_forgotten(base, rows, probe):+.3f}")
        num_differ = [row["num_differ"] for row in rows]
        cells.append("" if None in num_differ else f"{round(_mean(num_differ)):,}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(values) -> float:
    return float(np.mean(list(values)))


def difference(before: list[dict], after: list[dict], confidence: float) -> str:
    """Accuracy after - before in points, with its interval; both in the order of the seeds."""
    before_SN = np.array([row["right"] for row in before])
    after_SN = np.array([row["right"] for row in after])
    diffs_SN = 100 * (after_SN - before_SN)
    if len(diffs_SN) < 3:
        # Two seeds say nothing of others: the interval is about these models, over test rows.
        diffs_SN = diffs_SN.mean(axis=0, keepdims=True)
    bootstrap = Bootstrap(as_block(diffs_SN))
    low, high = bootstrap.interval(confidence)
    return f"{bootstrap.difference:+.1f} [{low:.1f}, {high:.1f}]"


def _forgotten(base_rows: list[dict], rows: list[dict], probe: str) -> float:
    """Loss on a probe above that of a base, which is the same for every seed."""
    return _mean(row["probes"][probe] for row in rows) - base_rows[0]["probes"][probe]


def main() -> None:
    """Run, or print the table of finished runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", type=Path)
    parser.add_argument("work", nargs="?", type=Path, help="where trained models go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", default=["intents"], choices=list(TASKS))
    parser.add_argument("--type", default="Q4_0", choices=TYPES, help="what holds the base")
    parser.add_argument("--results", type=Path, default=Path("results/smollm2-exact-in-four-bits"))
    parser.add_argument("--ready", action="store_true", help="only the mask that maskft brings; trains nothing")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write and print the table of a folder's results")
    args = parser.parse_args()
    if args.table is not None:
        text = table(args.table)
        (args.table / "table.md").write_text(text)
        print(text)
        return
    if args.work is None:
        parser.error("give the folder of the inputs, and one for trained models")
    if args.ready:
        run_ready(args)
        return
    for seed in args.seeds:
        for task in args.tasks:
            run(args, task, seed)


if __name__ == "__main__":
    main()
