"""``python -m benchmarks.gold_solutions``: do the published solutions of HumanEval and HumanEval+ pass in the sandbox?

``--busy N`` keeps N cores at work meanwhile: limits are in CPU time, so that a slow machine fails no right answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

from maskft.data.sources import read_file
from maskft_common.command_line import run_script
from maskft_lab.evaluation.benchmarks import code_with_tests, find_file
from maskft_lab.sandbox.sandbox import run_many


def main() -> None:
    """Run all solutions; end with status 1 if one fails that is not known to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gold_solutions", description=__doc__)
    parser.add_argument(
        "--data_dir",
        required=True,
        metavar="DIR",
        help="folder with HumanEval and HumanEvalPlus files",
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that loop meanwhile (default: 0)")
    args = parser.parse_args()

    # A busy machine, in which a limit of wall-clock time would fail right answers.
    loops = []
    for _ in range(args.busy):
        loop = multiprocessing.Process(target=_loop, daemon=True)
        loop.start()
        loops.append(loop)

    has_failed = False
    for task in ("humaneval", "humaneval_plus"):
        file = find_file(task, Path(args.data_dir))
        rows = [row for _, row in read_file(file)]
        started = time.perf_counter()
        results = run_many(code_with_tests(row, row["canonical_solution"]) for row in rows)
        wrong = {}  # id of a row -> reason
        for row, result in zip(rows, results, strict=True):
            if result.status != "passed":
                wrong[row["task_id"]] = result.reason
        seconds = time.perf_counter() - started
        num_passed = len(rows) - len(wrong)
        print(f"{task}: {num_passed} of {len(rows)} passed in {seconds:.0f} s; {wrong}")

        unexpected = set(wrong)
        if task == "humaneval_plus":
            # The published test of this one needs HumanEval+'s own harness.
            unexpected.discard("HumanEval/32")
        if unexpected:
            has_failed = True
    for loop in loops:
        loop.kill()
    raise SystemExit(int(has_failed))


def _loop() -> None:
    while True:
        pass


if __name__ == "__main__":
    run_script(main)
