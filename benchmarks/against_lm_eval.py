"""``python -m benchmarks.against_lm_eval``: maskft evaluate and lm-eval's command line on the same items of a model.

Both whole commands are timed, once, in turn, and prompts, outputs and scores are compared item by item. lm-eval's
scorer for HumanEval fetches a metric from the hub; here it writes its outputs for that task and does not score them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from maskft.data.sources import read_file
from maskft_common.command_line import positive, run_script
from maskft_common.environment import environment
from maskft_common.errors import UserError
from maskft_common.files import write_text
from maskft_lab.evaluation.benchmarks import BENCHMARKS, Benchmark, find_file

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
}
# HumanEval's prompts and stop strings without the scorer.
_HUMANEVAL = """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{canonical_solution}}"
num_fewshot: 0
generation_kwargs: {until: ["\\nclass", "\\ndef", "\\n#", "\\nif", "\\nprint"], max_gen_toks: 1024, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def main() -> None:
    """Run both sides on every task, print and write the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_lm_eval",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder or hub name")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder with the benchmarks' files")
    parser.add_argument("--tasks", default="gsm8k,humaneval,ifeval", help="of maskft (default: %(default)s)")
    parser.add_argument("--limit", type=positive, default=50, help="first items of each task (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=50, help="items at one time (default: %(default)s)")
    parser.add_argument("--output", default="runs/against_lm_eval", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args()

    # All tasks before the first of them runs for minutes.
    tasks = args.tasks.split(",")
    for task in tasks:
        if task not in BENCHMARKS:
            raise UserError(f"--tasks: no benchmark {task!r}; there are {', '.join(BENCHMARKS)}")
        find_file(task, Path(args.data_dir))

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    settings = {
        "model": Path(args.model).name,
        "limit": args.limit,
        "batch_size": args.batch_size,
    }
    rows = []
    for task in tasks:
        ours, our_seconds = run_maskft(task, args, folder)
        theirs, their_seconds = run_lm_eval(task, args, folder)
        row = compare(task, ours, theirs, our_seconds, their_seconds)
        console.print_json(json.dumps(row))
        rows.append(row)

        # After each task, because one takes many minutes.
        record = {
            "settings": settings,
            "environment": environment(),
            "rows": rows,
        }
        write_text(folder / "against_lm_eval.json", json.dumps(record, indent=1) + "\n")


def run_maskft(
    task: str,
    args,
    folder: Path,
) -> tuple[dict[str, dict], float]:
    """Items of our result file by id, and the seconds of the command."""
    out = folder / f"{task}-maskft"
    settings = {
        "model_name_or_path": args.model,
        "data_dir": args.data_dir,
        "output_dir": out,
        "tasks": task,
        "limit": args.limit,
        "batch_size": args.batch_size,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "maskft_lab.cli.main", "evaluate", "--overwrite", *words]
    seconds = timed(command, folder / f"{task}-maskft.log")

    # The result file of maskft evaluate.
    record = json.loads((out / "result.json").read_text())
    items = {item["id"]: item for item in record["tasks"][task]["items"]}
    return items, seconds


def run_lm_eval(
    task: str,
    args,
    folder: Path,
) -> tuple[dict[str, dict], float]:
    """lm-eval's samples by id, one for all filters, and the seconds of the command."""
    # Here, so that --help needs no extra.
    import lm_eval.tasks

    # lm-eval's task, except for its data, which comes from the file that maskft reads.
    tasks_folder = folder / "lm_eval_tasks"
    tasks_folder.mkdir(exist_ok=True)
    file = find_file(task, Path(args.data_dir))
    benchmark = BENCHMARKS[task]
    packaged = Path(lm_eval.tasks.__file__).parent / benchmark.config
    split = "train" if task == "ifeval" else "test"
    head = _HUMANEVAL if benchmark.program else f"include: {packaged}\n"
    (tasks_folder / f"{task}.yaml").write_text(
        f"{head}"
        f"task: {task}_local\n"
        "dataset_path: json\n"
        "dataset_name: null\n"
        f"test_split: {split}\n"
        f"dataset_kwargs: {{data_files: {{{split}: {json.dumps(str(file))}}}}}\n"
    )

    out = folder / f"{task}-lm_eval"
    settings = {
        "model": "hf",
        "model_args": f"pretrained={args.model},dtype=float32",
        "tasks": f"{task}_local",
        "include_path": tasks_folder,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "output_path": out,
    }
    words = []
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    # As maskft evaluate does for this benchmark.
    if benchmark.use_chat_template:
        words.append("--apply_chat_template")
    if benchmark.program:
        words.append("--predict_only")
    command = [sys.executable, "-m", "lm_eval", "run", *words, "--log_samples"]
    nltk_data = str(Path(args.data_dir) / "nltk_data")
    seconds = timed(command, folder / f"{task}-lm_eval.log", NLTK_DATA=nltk_data)

    # Each call writes a file with its time in the name.
    samples = max(out.rglob("samples_*.jsonl"), key=lambda path: path.stat().st_mtime)
    return items_of(samples, benchmark), seconds


def items_of(samples: Path, benchmark: Benchmark) -> dict[str, dict]:
    """The items of a file of lm-eval's samples, by id."""
    items = {}
    # Not by splitlines, which also splits at characters that a model may write within a line, such as U+2028.
    for _, sample in read_file(samples):
        if benchmark.id_field:
            identity = str(sample["doc"][benchmark.id_field])
        else:
            identity = str(sample["doc_id"])
        if identity not in items:
            items[identity] = {
                "prompt_hash": sample["prompt_hash"],
                "output": sample["resps"][0][0],
                "scores": {},
            }

        # An item has a line for each filter, with the metrics of that filter.
        for metric in sample.get("metrics", ()):
            name = benchmark.metrics.get(f"{metric},{sample['filter']}")
            if name is not None and isinstance(sample[metric], (bool, int, float)):
                items[identity]["scores"][name] = float(sample[metric])
    return items


def compare(
    task: str,
    ours: dict,
    theirs: dict,
    our_seconds: float,
    their_seconds: float,
) -> dict:
    """The items whose prompts, outputs or scores differ, and the two times."""
    # Else the times are not comparable either.
    assert ours.keys() == theirs.keys(), "the two sides answered different items"

    # Scores that lm-eval gives for any item; it does not score programs here.
    scores = set()
    for item in theirs.values():
        scores.update(item["scores"])

    prompts_differ = []
    outputs_differ = []
    scores_differ = []
    for identity, our_item in ours.items():
        their_item = theirs[identity]
        our_scores = {name: float(our_item[name]) for name in scores}
        if our_item["prompt_hash"] != their_item["prompt_hash"]:
            prompts_differ.append(identity)
        if our_item["output"] != their_item["output"]:
            outputs_differ.append(identity)
        if our_scores != their_item["scores"]:
            scores_differ.append(identity)

    return {
        "task": task,
        "items": len(ours),
        "prompts_differ": prompts_differ,
        "outputs_differ": outputs_differ,
        "scores_compared": sorted(scores),
        "scores_differ": scores_differ,
        "maskft_s": round(our_seconds, 1),
        "lm_eval_s": round(their_seconds, 1),
        "lm_eval / maskft": round(their_seconds / our_seconds, 2),
    }


def timed(command: list[str], log: Path, **environ: str) -> float:
    """Run a command with its output in ``log``; returns its seconds."""
    started = time.perf_counter()
    environment_of_command = os.environ | _OFFLINE | environ
    with log.open("w") as file:
        done = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment_of_command,
        )
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {log} has its output")
    return time.perf_counter() - started


if __name__ == "__main__":
    run_script(main, extra="eval")
