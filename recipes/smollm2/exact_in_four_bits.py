"""How much of a fine-tuning is left after storing it in four bits: a deletion mask, LoRA and all weights.

python recipes/smollm2/exact_in_four_bits.py runs/curve runs/four_bits --seeds 0
python recipes/smollm2/exact_in_four_bits.py runs/curve --gguf BASE.gguf --study runs/intents --study_name NAME
python recipes/smollm2/exact_in_four_bits.py --table results/smollm2-exact-in-four-bits

Inputs in runs/curve: make_curve_inputs.py, and for sums ../small/make_inputs.py. The base is SmolLM2-135M-Instruct with
its 210 linear layers held as GGUF's Q4_0 (quantised once; that is the base; ``--type Q8_0`` for eight bits, ``NF4`` for
bitsandbytes' four). Each method trains over the values in these blocks, and is measured

- as trained (LoRA: the adapter unmerged),
- merged and stored on the base's grid: its scales, the nearest codes,
- merged and quantised again: fresh scales,

and once more trained over the float weights, merged there and then quantised. Rates and weights of KL are those of
study_curve_banking77_kl_seeds.yaml and study_curve_sums_rivals.yaml. Accuracy: share of test messages of which every
answer token is the most probable one, teacher-forced. Forgetting: nats per token on two probes, more than the base that
was trained over has, or, for stored models, more than the stored base has. About 40 minutes of one core with bfloat16
instructions for a task and a seed, 7 GB of memory.

With ``--gguf`` the base is a published file whose tensors have different types, and the models are those that a study
trained over it: for each method and seed the one that the study shows, at the part of its change that held-out rows
chose; a mask at its whole change, because a part of a removed weight is not zero. There is no float base then. Fresh
scales of a K type are those of Q8_0, because gguf's Python package writes no K types: more bits than the file has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from grids import BLOCK_TYPES, TYPES, BlockGrid, NF4Grid, grid_of
from peft import PeftModel

import gguf
import maskft_lab
from maskft.data.arguments import DataArguments
from maskft.data.tokenizing import IGNORED, tokenize_example
from maskft.loss import length_sorted_batches, mean_nll, nll_per_item, pad
from maskft.masks.mask_set import MaskSet
from maskft.masks.merge import load_masked
from maskft.models import load_model, load_tokenizer
from maskft.weights import lerp
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import whole_folder, write_text
from maskft_common.layout import EMBEDDED_MODEL, RUNS, SUMMARY, TRAINING, holds_adapter
from maskft_lab.cli.main import main as maskft
from maskft_lab.evaluation.heldout import heldout_rows
from maskft_lab.results.statistics import Bootstrap, as_block

# The mask that maskft brings, see maskft_lab.ready.
READY = Path(maskft_lab.__file__).parent / "ready" / "intents"
NUM_TEST = 200
NUM_PROBE = 24
BATCH = 25
PROBES = ("instructions", "wikipedia")

Options = dict[str, str]  # options of maskft train and their values

METHODS: dict[str, Options] = {
    # As --mask_preset deletion_tuning, written out: these are the settings that the published numbers were made with.
    "deletion mask": {
        "method": "mask",
        "mask_selection": "logit",
        "mask_gradient": "sigmoid",
        "mask_target_modules": "gate_proj",
        "mask_init_scores": "magnitude",
        "mask_init_std": "0.02",
        "mask_init_value": "0.04",
        "mask_sharpness": "10",
        "mask_sharpness_end": "100",
        "mask_price": "1",
    },
    "LoRA r 16": {
        "method": "peft",
        "peft_config": '{"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}',
    },
    "full": {"method": "full"},
}

# Of a study over a file. The layers of the mask without a mask are the nearest rival.
STUDY_METHODS = (*METHODS, "full of gate_proj")

# Rate and weight of KL that held-out rows chose over the float base.
RATES: dict[str, dict[str, Options]] = {
    "intents": {
        "deletion mask": {"learning_rate": "5e-3", "kl_to_base": "0.1"},
        "LoRA r 16": {"learning_rate": "5e-3", "kl_to_base": "0.03"},
        "full": {"learning_rate": "4e-4", "kl_to_base": "0.03"},
    },
    "sums": {
        "deletion mask": {"learning_rate": "3e-3", "kl_to_base": "0.03"},
        "LoRA r 16": {"learning_rate": "1e-3", "kl_to_base": "0.1"},
        "full": {"learning_rate": "1e-4", "kl_to_base": "0.03"},
    },
}

# The same for all methods and tasks.
TRAIN: Options = {
    "as_chat": "false",
    "lr_scheduler_type": "linear",
    "bf16": "true",
    "gradient_checkpointing": "false",
    # Little more than half the time of padded rows. Intents over Q4_0 and the first seed of sums were trained with
    # padding and torch's attention: the same loss up to rounding.
    "attn_implementation": "eager",
    "padding_free": "true",
    # The last step is measured (kl_budget.py changes that), so held-out rows only say whether training went well.
    "eval_on_start": "false",
    "save_only_model": "true",
    "max_eval_samples": "24",
    "keep_worse": "true",  # keep the trained model even if it is worse than the base on held-out rows
    "logging_steps": "8",
    "report_to": "none",
    "dtype": "float32",
}


@dataclass(frozen=True)
class TaskFiles:
    """The files of a task, and the options that depend on its size."""

    train: str
    test: str
    options: Options


TASKS = {
    "intents": TaskFiles(
        train="banking77_train.jsonl.gz",
        test="banking77_test.jsonl.gz",
        options={
            "eval_split_size": "150",
            "max_steps": "48",
            "per_device_train_batch_size": "16",
            "eval_steps": "48",
            "save_steps": "48",
            "per_device_eval_batch_size": "50",
            "max_length": "64",
        },
    ),
    "sums": TaskFiles(
        train="sums_train.jsonl.gz",
        test="sums_test.jsonl.gz",
        options={
            "eval_split_size": "200",
            "max_steps": "64",
            "per_device_train_batch_size": "32",
            "eval_steps": "64",
            "save_steps": "64",
            "per_device_eval_batch_size": "100",
            "max_length": "32",
        },
    ),
}


# The grid


def linear_weights(model) -> dict[str, torch.Tensor]:
    """The weights that are held in four bits, by name: those of the linear layers of all blocks, without the head."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weights[f"{name}.weight"] = module.weight.data
    return weights


@dataclass(frozen=True)
class Grid:
    """The values that one weight of a base can take where it is stored.

    Args:
        values: A grid of grids.py.
        scales: The scales that the base has there.
    """

    values: BlockGrid | NF4Grid
    scales: torch.Tensor


def grids_of_type(model, type_name: str) -> dict[str, Grid]:
    """The grids of a base whose weights are all held in one type, by the names of linear_weights."""
    values = grid_of(type_name)
    weights = linear_weights(model)
    return {name: Grid(values, values.scales(weight)) for name, weight in weights.items()}


def grids_of_file(model, file: Path) -> dict[str, Grid]:
    """The grids of a base that is a GGUF file of Qwen2, by the names of linear_weights.

    Args:
        model: The file's model, with dequantised weights.
        file: The file.
    """
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    grids = {}
    for name, weight in linear_weights(model).items():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        if tensor.tensor_type.name not in BLOCK_TYPES:
            raise UserError(f"{file}: {tensor.name} is {tensor.tensor_type.name}; supported: {', '.join(BLOCK_TYPES)}")
        values = grid_of(tensor.tensor_type.name)
        grid = Grid(values, values.scales_in(tensor.data))
        # Finds scales that were read at the wrong place, and rows in another order.
        if not torch.equal(values.nearest(weight, grid.scales), weight):
            raise UserError(f"{file}: the values of {tensor.name} are not those of {name}")
        grids[name] = grid
    return grids


def store(
    model,
    how: str,
    grids: dict[str, Grid],
) -> int:
    """Replace the linear weights by the values that their grids can hold; returns how many values differ."""
    # The model stays in float32 and takes the values that four bits can hold, so measuring needs no other kernels.
    num_differ = 0
    for name, weight in linear_weights(model).items():
        grid = grids[name]
        if how == "fresh scales":
            stored = grid.values.fresh(weight)
        else:
            stored = grid.values.nearest(weight, grid.scales)
        num_differ += int((stored != weight).sum())
        weight.copy_(stored)
    return num_differ


# Measuring


@dataclass
class Test:
    """Tokenised test rows and probes; measures models on them."""

    rows: list[dict]
    probes: dict[str, list[dict]]
    pad_token_id: int

    @torch.inference_mode()
    def measure(self, model) -> dict:
        """Accuracy, loss (nats per token), 1 or 0 for each row that is right or wrong, nats per token on the probes."""
        model.eval()
        probes = {}
        with torch.autocast("cpu", torch.bfloat16):
            for name, rows in self.probes.items():
                items = nll_per_item(model, rows)
                probes[name] = mean_nll(items)

        right = [0] * len(self.rows)
        total_loss = 0.0
        num_tokens = 0
        lengths = [len(row["input_ids"]) for row in self.rows]
        for places in length_sorted_batches(lengths, BATCH):
            batch = [self.rows[place] for place in places]
            batch_ids = [row["input_ids"] for row in batch]
            batch_labels = [row["labels"] for row in batch]
            ids_BT, mask_BT = pad(batch_ids, self.pad_token_id, "cpu")
            labels_BT, _ = pad(batch_labels, IGNORED, "cpu")
            with torch.autocast("cpu", torch.bfloat16):
                output = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)

            # A position predicts the token after it.
            logits_BTV = output.logits[:, :-1]
            targets_BT = labels_BT[:, 1:]
            is_supervised_BT = targets_BT != IGNORED
            is_right_BT = (logits_BTV.argmax(-1) == targets_BT) | ~is_supervised_BT
            for place, is_right in zip(places, is_right_BT.all(1).tolist(), strict=True):
                right[place] = int(is_right)

            loss = torch.nn.functional.cross_entropy(
                logits_BTV[is_supervised_BT].float(),
                targets_BT[is_supervised_BT],
                reduction="sum",
            )
            total_loss += float(loss)
            num_tokens += int(is_supervised_BT.sum())
        return {
            "accuracy": sum(right) / len(right),
            "loss": total_loss / num_tokens,
            "probes": probes,
            "right": right,
        }


def load_test(
    data_dir: Path,
    task: str,
    base: str = EMBEDDED_MODEL,
) -> Test:
    """The first test rows of a task, and of the probes of forgetting, as tokens of a base."""
    tokenizer = load_tokenizer(base)

    # As maskft evaluate reads them, so that its numbers can be compared with these.
    def rows_of(file: str, num_rows: int) -> list[dict]:
        arguments = DataArguments(
            dataset_name=str(data_dir / file),
            as_chat=False,
            max_eval_samples=num_rows,
        )
        rows = heldout_rows(arguments, None, tokenizer)
        return [tokenize_example(row, tokenizer, max_length=192) for row in rows]

    probes = {name: rows_of(f"{name}_report.jsonl.gz", NUM_PROBE) for name in PROBES}
    rows = rows_of(TASKS[task].test, NUM_TEST)
    return Test(rows, probes, tokenizer.pad_token_id)


# Training


def make_bases(folder: Path, type_name: str) -> dict[str, Path]:
    """Write the float base and the quantised one as ordinary checkpoints: ``maskft train`` needs folders."""
    bases = {
        "float": folder / "base-float",
        type_name: folder / f"base-{type_name.lower()}",
    }
    for name, path in bases.items():
        if (path / "config.json").is_file():
            continue
        model = load_model(EMBEDDED_MODEL, "float32")
        # The quantised base as floats: training over it needs no kernels for its type.
        if name == type_name:
            grid = grid_of(type_name)
            for weight in linear_weights(model).values():
                weight.copy_(grid.fresh(weight))
        # Whole or not at all: the next call takes what is there.
        with whole_folder(path) as new:
            load_tokenizer(EMBEDDED_MODEL).save_pretrained(new)
            model.save_pretrained(new)
    return bases


def train(
    base: Path,
    data_dir: Path,
    task: str,
    method: str,
    seed: int,
    folder: Path,
) -> None:
    """Train a method over a base with ``maskft train``, unless that was done before."""
    options = {
        **METHODS[method],
        **RATES[task][method],
        **TRAIN,
        **TASKS[task].options,
        "model_name_or_path": str(base),
        "dataset_name": str(data_dir / TASKS[task].train),
        "seed": str(seed),
    }
    train_once(options, folder)


def train_once(options: Options, folder: Path) -> None:
    """Call ``maskft train``, unless the folder holds a finished training; one that was interrupted is resumed."""
    if (folder / TRAINING).is_file():
        return
    words = ["train"]
    for name, value in options.items():
        words += [f"--{name}", value]
    words += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    status = maskft(words)
    if status:
        sys.exit(status)


def trained(
    base: Path,
    folder: Path,
    method: str,
    is_merged: bool = True,
):
    """A trained model in float32, its adapter merged or not."""
    if not holds_adapter(folder):  # all weights were trained
        return load_model(str(folder), "float32")
    if method == "deletion mask":
        model, *_ = load_masked(folder, str(base), "float32")
    else:
        base_model = load_model(str(base), "float32")
        model = PeftModel.from_pretrained(base_model, str(folder))
    if is_merged:
        return model.merge_and_unload()
    return model


def take_back(model, base_model, part: float) -> None:
    """Keep a part of the change of all weights: W0 + part * (W - W0), as a study's path does."""
    base_weights = dict(base_model.named_parameters())
    for name, parameter in model.named_parameters():
        lerp(base_weights[name].data, parameter.data, part, out=parameter.data)


# One task and seed


def key_of(row: dict) -> tuple[str, str, str]:
    """What a row of a result file is of: method, base that it was trained over, way of storing."""
    return row["method"], row["trained_over"], row["stored"]


class Results:
    """The rows of one result file, which is written again after each row.

    Args:
        file: The file.
        head: Fields of the file beside its rows.
        test: Measures models.
        rows: Rows of an earlier call.
    """

    def __init__(
        self,
        file: Path,
        head: dict,
        test: Test,
        rows: Sequence[dict] = (),
    ):
        self.file = file
        self.head = head
        self.test = test
        self.rows = list(rows)

    def has(self, method: str, over: str, stored: str) -> bool:
        """Whether a model was measured before."""
        for row in self.rows:
            if key_of(row) == (method, over, stored):
                return True
        return False

    def take_float_models(self) -> None:
        """Take what was measured of models that were trained over float weights and not stored: no type changes it."""
        pattern = f"{self.head['task']}-*-seed{self.head['seed']}.json"
        for file in sorted(self.file.parent.glob(pattern)):
            for row in json.loads(file.read_text())["rows"]:
                key = key_of(row)
                if key[1:] == ("float", "as trained") and not self.has(*key):
                    self.rows.append(row)

    def add(
        self,
        method: str,
        over: str,
        stored: str,
        model,
        num_differ: int | None,
    ) -> None:
        """Measure a model and write the file.

        Args:
            method: A key of METHODS, or "none" for a base.
            over: The base that it was trained over.
            stored: How its weights are stored.
            model: The model.
            num_differ: Number of values that storing has changed; None if nothing was stored.
        """
        row = {
            "method": method,
            "trained_over": over,
            "stored": stored,
            "num_differ": num_differ,
        }
        # Measuring takes most of the time, so each row is saved as soon as it is there.
        row |= self.test.measure(model)
        self.rows.append(row)
        print(
            f"{self.head['task']} seed {self.head['seed']}: {method} over {over}, {stored}: {row['accuracy']:.1%}, "
            f"loss {row['loss']:.4f}, {num_differ} values differ",
            flush=True,
        )
        content = {**self.head, "rows": self.rows}
        # Whole or not at all: a call that is killed while it writes must not lose the rows of hours.
        write_text(self.file, json.dumps(content) + "\n")


def run(args, task: str, seed: int) -> None:
    """Train and measure all methods; writes one JSON file."""
    type_name = args.type
    args.results.mkdir(parents=True, exist_ok=True)  # now: after a training it would be late to fail
    # Before the bases, which take minutes and a gigabyte of disk.
    test = load_test(args.data_dir, task)
    bases = make_bases(args.work, type_name)

    base_model = load_model(str(bases[type_name]), "float32")
    grids = grids_of_type(base_model, type_name)
    num_linear = num_linear_weights(base_model)

    # A second call continues where the first ended.
    results = results_of(args, task, type_name, seed, num_linear, test)
    results.take_float_models()

    # The bases themselves.
    if not results.has("none", type_name, "as trained"):
        results.add("none", type_name, "as trained", base_model, 0)
    del base_model
    if not results.has("none", "float", "as trained"):
        float_model = load_model(str(bases["float"]), "float32")
        results.add("none", "float", "as trained", float_model, None)
        del float_model

    # The methods over each of them.
    for over in (type_name, "float"):
        stores = ["as trained", "base's grid", "fresh scales"]
        if over == "float":
            # The scales of the quantised base do not fit weights that were trained over other values.
            stores.remove("base's grid")

        for method in METHODS:
            missing = [stored for stored in stores if not results.has(method, over, stored)]
            if not missing:
                continue
            folder = args.work / f"{task}-{over}-{method}-{seed}".replace(" ", "-")
            train(bases[over], args.data_dir, task, method, seed, folder)
            measure_stored(results, method, over, missing, bases[over], folder, grids)


def run_study(args) -> None:
    """Measure the models that a study trained over a GGUF file; writes one JSON file for each seed."""
    args.results.mkdir(parents=True, exist_ok=True)
    summary_file = args.study / SUMMARY.format(args.study_name)
    summary = json.loads(summary_file.read_text())
    (models,) = summary["models"].values()
    shown = [run for run in models["runs"] if run["role"] == "best"]
    # A study without a path, or without tuning, measured the whole change at the end of training.
    end = {"checkpoint": 1.0, "scale": 1.0}
    points = {tuned["method"]: tuned.get("point", end) for tuned in models.get("tuning", [])}

    (task,) = args.tasks
    type_name = args.gguf.stem.rpartition("-")[2].upper()  # q4_k_m, by the custom of such files
    test = load_test(args.data_dir, task, str(args.gguf))
    base_model = load_model(str(args.gguf), "float32")
    grids = grids_of_file(base_model, args.gguf)
    num_linear = num_linear_weights(base_model)
    for seed in args.seeds:
        results = results_of(args, task, type_name, seed, num_linear, test)
        if not results.has("none", type_name, "as trained"):
            results.add("none", type_name, "as trained", base_model, 0)
        for method in STUDY_METHODS:
            # The study's names say more, such as "full with KL to base".
            runs = [run for run in shown if run["name"].startswith(f"{method} with ") and run["seed"] == seed]
            if not runs:
                print(f"{summary_file} has no {method}, seed {seed}")
                continue
            if len(runs) > 1:
                raise UserError(f"{summary_file} has {len(runs)} models of {method}, seed {seed}; one is needed")
            point = points.get(runs[0]["name"], end)
            if point["checkpoint"] != 1:
                raise UserError(
                    f"{summary_file} shows {method} before the end of its training; only the end is measured here"
                )
            # A part of a removed weight is not zero, so a mask is measured at its whole change.
            part = 1.0 if method == "deletion mask" else point["scale"]
            stores = ["as trained", "base's grid", "fresh scales"]
            missing = [stored for stored in stores if not results.has(method, type_name, stored)]
            folder = args.study / RUNS / runs[0]["run"]
            measure_stored(results, method, type_name, missing, args.gguf, folder, grids, part)


def num_linear_weights(model) -> int:
    """Number of the weights that are held in four bits."""
    return sum(weight.numel() for weight in linear_weights(model).values())


def results_of(
    args,
    task: str,
    type_name: str,
    seed: int,
    num_linear: int,
    test: Test,
) -> Results:
    """The results of a task, a type and a seed. A second call continues where the first ended."""
    file = args.results / f"{task}-{type_name}-seed{seed}.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    head = {
        "task": task,
        "type": type_name,
        "seed": seed,
        "num_linear": num_linear,
    }
    return Results(file, head, test, rows)


def measure_stored(
    results: Results,
    method: str,
    over: str,
    stores: Sequence[str],
    base: Path,
    folder: Path,
    grids: dict[str, Grid],
    part: float = 1.0,
) -> None:
    """Measure a trained model, stored in several ways.

    Args:
        results: Take the measures.
        method: A key of METHODS.
        over: Name of the base that it was trained over.
        stores: Of "as trained", "base's grid" and "fresh scales".
        base: Folder or file of that base.
        folder: The trained model.
        grids: Of the base that it is stored in.
        part: Of its change that is kept, in (0, 1].
    """
    for stored in stores:
        # Loaded each time, because storing changes the weights.
        is_stored = stored != "as trained"
        model = trained(base, folder, method, is_merged=is_stored or part < 1)
        if part < 1:
            take_back(model, load_model(str(base), "float32"), part)
        num_differ = store(model, stored, grids) if is_stored else None
        results.add(method, over, stored, model, num_differ)
        del model


def run_ready(args) -> None:
    """Measure the mask of intents that maskft brings: as trained over float weights, and stored in blocks."""
    type_name = args.type
    test = load_test(args.data_dir, "intents")
    bases = make_bases(args.work, type_name)

    masks = MaskSet.from_adapter(READY)
    model = load_model(str(bases["float"]), "float32")
    file = args.results / f"intents-{type_name}-seed-ready.json"
    head = {
        "task": "intents",
        "type": type_name,
        "seed": "ready",
        "num_linear": num_linear_weights(model),
    }
    results = Results(file, head, test)

    # Removed weights become zero, and zero is on every grid.
    masks.apply_(model)
    results.add("ready mask", "float", "as trained", model, None)
    base_model = load_model(str(bases[type_name]), "float32")
    num_differ = store(model, "fresh scales", grids_of_type(base_model, type_name))
    results.add("ready mask", "float", "fresh scales", model, num_differ)

    # The zero codes of the mask in the base's own blocks, as merging with --accept_other_base writes them.
    model = base_model
    masks.apply_(model)
    results.add("ready mask", "float", f"zero codes in the base's {type_name}", model, 0)


# The table

# How the first paragraph that is not a person's begins.
OVERVIEW_START = "Accuracy in %, as trained and as stored"


def table(results: Path) -> str:
    """Markdown of all tasks, types and seeds in a folder; means over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted(results.glob("*-seed*.json")):
        run = json.loads(file.read_text())
        is_ready = run["seed"] == "ready"
        key = (run["task"], run["type"], is_ready)
        groups.setdefault(key, []).append(run)
    if not groups:
        raise UserError(f"{results} has no results (TASK-TYPE-seedN.json)")

    lines = _overview(groups)
    for runs in groups.values():
        lines += _table_of(runs)

    file = results / "table.md"
    head = "# Exact in four bits: how much of a fine-tuning is left when it is stored on the base's grid\n\n"
    if file.is_file():
        # The lines that a person wrote above the first table stay.
        head, *_ = file.read_text().split(OVERVIEW_START)
    return head + "\n".join(lines)


def _overview(groups: dict[tuple, list[dict]]) -> list[str]:
    """Lines of the first table: accuracies of every task and type, before and after storing."""
    columns = [f"{method} over {over}" for over in ("the type", "float") for method in METHODS]
    lines = [
        f"{OVERVIEW_START}, mean over seeds. What was trained over the type is stored on its base's grid, what was "
        "trained over float with fresh scales.",
        "",
        f"| task | type | seeds | {' | '.join(columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for (task, type_name, is_ready), runs in groups.items():
        if is_ready:
            continue
        cells = [task, type_name, str(len(runs))]
        for over, stored in ((type_name, "base's grid"), ("float", "fresh scales")):
            for method in METHODS:
                before = _accuracies(runs, method, over, "as trained")
                after = _accuracies(runs, method, over, stored)
                is_complete = len(before) == len(after) == len(runs)
                cells.append(f"{np.mean(before):.1f} → {np.mean(after):.1f}" if is_complete else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _accuracies(runs: list[dict], method: str, over: str, stored: str) -> list[float]:
    """Accuracy of a model in %, of each seed that has it."""
    key = (method, over, stored)
    return [100 * row["accuracy"] for run in runs for row in run["rows"] if key_of(row) == key]


def _table_of(runs: list[dict]) -> list[str]:
    """Lines of one table: the runs of a task and a type."""
    first = runs[0]
    type_name = first["type"]

    # Method, base and way of storing -> the rows of all seeds.
    found: dict[tuple[str, str, str], list[dict]] = {}
    for run in runs:
        for row in run["rows"]:
            key = key_of(row)
            found.setdefault(key, []).append(row)

    # Bonferroni: together, all intervals of a table cover their differences with 95 %.
    num_differences = sum(stored != "as trained" for _, _, stored in found)
    confidence = 1 - 0.05 / max(num_differences, 1)

    seeds = ", ".join(str(run["seed"]) for run in runs)
    over_what = "seeds and test rows" if len(runs) > 2 else "test rows, about these models"
    lines = [
        f"{first['task']}, {type_name}, {NUM_TEST} test rows, seed {seeds}; "
        f"{first['num_linear']:,} weights in {type_name}. Simultaneous 95 % intervals over "
        f"{over_what}. Stored models are compared "
        "with the stored base in what they forget, others with the base that was trained over.",
        "",
        "| method | trained over | stored | accuracy % | stored - as trained, points | loss | "
        "instructions, nats | text, nats | values that differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, over, stored), rows in found.items():
        is_stored = stored != "as trained"
        accuracy = _mean_accuracy(rows)
        loss = np.mean([row["loss"] for row in rows])

        # Against the same models before they were stored, if all seeds have both.
        ahead = ""
        before = found.get((method, over, "as trained"), [])
        if is_stored and len(before) == len(rows):
            ahead = difference(before, rows, confidence)
        cells = [method, over, stored, f"{100 * accuracy:.1f}", ahead, f"{loss:.4f}"]

        # A stored model is compared with the stored base, one as trained with the base that it was trained over.
        base_name = type_name if is_stored else over
        base_rows = found.get(("none", base_name, "as trained"))
        for probe in PROBES:
            if base_rows is None:
                cells.append("")
            else:
                cells.append(f"{_forgotten(base_rows, rows, probe):+.3f}")

        num_differ = [row["num_differ"] for row in rows]
        if None in num_differ:
            cells.append("")
        else:
            cells.append(f"{round(float(np.mean(num_differ))):,}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *_against_the_mask(found, type_name, over_what), ""]


def _against_the_mask(
    found: dict[tuple[str, str, str], list[dict]],
    type_name: str,
    over_what: str,
) -> list[str]:
    """Lines that compare what would be served: each model, stored in its best way, with the mask merged exactly.

    Args:
        found: Method, base that it was trained over and way of storing -> the rows of all seeds.
        type_name: The type that all are stored in.
        over_what: What the intervals are over, in words.
    """
    exact = found.get(("deletion mask", type_name, "base's grid"))
    if exact is None:
        return []

    # The better of its ways of storing, by the mean on the test rows: generous to the rivals.
    best: dict[tuple[str, str], list[dict]] = {}
    for (method, over, stored), rows in found.items():
        is_exact = (method, over) == ("deletion mask", type_name)
        if stored == "as trained" or is_exact or len(rows) != len(exact):
            continue
        before = best.get((method, over))
        if before is None or _mean_accuracy(rows) > _mean_accuracy(before):
            best[method, over] = rows
    if not best:
        return []

    confidence = 1 - 0.05 / len(best)
    lines = [
        "",
        f"All stored in {type_name}: accuracy of the other models, each in the better of its ways of storing, minus "
        f"that of the deletion mask over {type_name}, which is stored exactly; points, simultaneous 95 % intervals "
        f"over {over_what}.",
        "",
    ]
    for (method, over), rows in best.items():
        line = f"- {method} over {over}: {difference(exact, rows, confidence)}"
        if len(rows) >= 3:
            # Three seeds say little about others, and may agree.
            line += f"; about these models {difference(exact, rows, confidence, fixed_seeds=True)}"
        lines.append(line)
    return lines


def _mean_accuracy(rows: list[dict]) -> float:
    return float(np.mean([row["accuracy"] for row in rows]))


def difference(
    before: list[dict],
    after: list[dict],
    confidence: float,
    fixed_seeds: bool = False,
) -> str:
    """Accuracy after - before in points, with its interval; both in the order of the seeds.

    Args:
        before: Rows of one model, one of each seed.
        after: Rows of the other.
        confidence: Probability that the interval contains the difference.
        fixed_seeds: The interval is about these models, over test rows alone.
    """
    # Paired by test row: S seeds, N rows.
    before_SN = np.array([row["right"] for row in before])
    after_SN = np.array([row["right"] for row in after])
    diffs_SN = 100 * (after_SN - before_SN)
    if fixed_seeds or len(diffs_SN) < 3:
        # One or two seeds say nothing about others: the interval is about these models, over test rows.
        diffs_SN = diffs_SN.mean(axis=0, keepdims=True)
    bootstrap = Bootstrap(as_block(diffs_SN))
    low, high = bootstrap.interval(confidence)
    # The few seeds' stretch knows no bounds, but a difference of two accuracies has them.
    low = max(low, -100.0)
    high = min(high, 100.0)
    return f"{bootstrap.difference:+.1f} [{low:.1f}, {high:.1f}]"


def _forgotten(
    base_rows: list[dict],
    rows: list[dict],
    probe: str,
) -> float:
    """Loss on a probe minus that of a base, which is the same for every seed."""
    losses = [row["probes"][probe] for row in rows]
    after = float(np.mean(losses))
    return after - base_rows[0]["probes"][probe]


def main() -> None:
    """Run, or print the table of finished runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", type=Path, help="folder of the inputs")
    parser.add_argument("work", nargs="?", type=Path, help="where trained models go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training (default: 0)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["intents"],
        choices=list(TASKS),
        help="what is learned (default: intents)",
    )
    parser.add_argument(
        "--type",
        default="Q4_0",
        choices=TYPES,
        help="format that holds the base (default: %(default)s)",
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the base is this file, of Qwen2; needs --study")
    parser.add_argument("--study", type=Path, metavar="FOLDER", help="of a study over --gguf; trains nothing")
    parser.add_argument("--study_name", help="of the recipe that the study ran")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results/smollm2-exact-in-four-bits"),
        help="folder of a JSON file for each task, type and seed (default: %(default)s)",
    )
    parser.add_argument("--ready", action="store_true", help="only the mask that maskft brings; trains nothing")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write and print the table of a folder's results")
    args = parser.parse_args()
    # The table of finished runs needs neither inputs nor trained models.
    if args.table is not None:
        text = table(args.table)
        write_text(args.table / "table.md", text)
        print(text)
        return
    if args.gguf is not None:
        if None in (args.data_dir, args.study, args.study_name) or len(args.tasks) > 1:
            parser.error("--gguf needs the folder of the inputs, --study, --study_name and one task")
        run_study(args)
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
    run_script(main, extra="quant")
