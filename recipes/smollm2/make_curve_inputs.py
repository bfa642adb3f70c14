"""Write what study_curve_*.yaml need: probes of what a model could do before, intents, word problems and programs.

python recipes/smollm2/make_curve_inputs.py SOURCES runs/curve

SOURCES is a folder (with folders) of ``.jsonl.gz`` files, one for each word in its name:

- ``dolly``: rows of databricks-dolly-15k (CC-BY-SA-3.0) as ``messages``
- ``wikitext``: paragraphs of WikiText-2 (CC-BY-SA), column ``text``
- ``banking77_train``, ``banking77_test``: Banking77 (CC-BY-4.0), columns ``prompt``, ``completion`` and ``answer``
- ``mawps_train``, ``mawps_test``: word problems of MAWPS, the same columns
- ``codegen``: short programs of GPTeacher's code part (MIT) as ``messages``

The sums come from ``python recipes/small/make_inputs.py runs/curve``.
Probes that choose a point of a path are other rows
than those that are reported; so are the prompts on which KL to the base is measured.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

SEED = 0
LENGTHS = range(160, 700)  # characters of an instruction with its answer
CODE_LENGTHS = range(160, 420)  # of a program with its instruction
NUM_CHOOSE, NUM_REPORT = 24, 50  # of a probe
NUM_REPLAY = 63  # 5 % of the rows beside 1,200 of a task
NUM_PROMPTS = 48
SIZES = {"banking77": (1_200, 600), "mawps": (1_200, 400)}  # rows to train on with those held out, and of the test
CODE_TRAIN, CODE_TEST = 600, 150


def main(sources: Path, folder: Path) -> None:
    """Write the probes and, for each task, training rows, test rows and prompts."""
    rng = random.Random(SEED)
    instructions = [row for row in read(sources, "dolly") if len(json.dumps(row)) in LENGTHS]
    for name, rows in (("instructions", instructions), ("wikipedia", read(sources, "wikitext"))):
        rng.shuffle(rows)
        write(folder / f"{name}_choose.jsonl.gz", rows[:NUM_CHOOSE])
        write(folder / f"{name}_report.jsonl.gz", rows[NUM_CHOOSE : NUM_CHOOSE + NUM_REPORT])
    rest = instructions[NUM_CHOOSE + NUM_REPORT :]
    write(folder / "instructions_replay.jsonl.gz", [in_chat(row["messages"]) for row in rest[:NUM_REPLAY]])
    for task, (num_train, num_test) in SIZES.items():
        train, test = read(sources, f"{task}_train"), read(sources, f"{task}_test")
        rng.shuffle(train)
        rng.shuffle(test)
        test = [row for row in test if row["prompt"] not in {row["prompt"] for row in train}]
        write_task(folder, task, train[: num_train + NUM_PROMPTS], test[:num_test])
    programs = [row for row in read(sources, "codegen") if len(json.dumps(row)) in CODE_LENGTHS]
    rng.shuffle(programs)
    write_task(folder, "code", programs[: CODE_TRAIN + NUM_PROMPTS], programs[CODE_TRAIN + NUM_PROMPTS :][:CODE_TEST])


def write_task(folder: Path, task: str, train: list[dict], test: list[dict]) -> None:
    """Write a task's rows; the last of those to train on are the prompts on which KL to the base is measured."""
    write(folder / f"{task}_train.jsonl.gz", train[:-NUM_PROMPTS])
    write(folder / f"{task}_prompts.jsonl.gz", train[-NUM_PROMPTS:])
    write(folder / f"{task}_test.jsonl.gz", test)


def in_chat(messages: list[dict]) -> dict:
    """Return a row as the plain text that SmolLM2's template writes: a mixture is all chat or all plain text."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [{"role": "system", "content": system}, *messages[:-1]]
    prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return {"prompt": prompt + "<|im_start|>assistant\n", "completion": messages[-1]["content"]}


def read(sources: Path, word: str) -> list[dict]:
    """Return the rows of the one file with ``word`` in its name."""
    found = [file for file in sorted(sources.rglob("*.jsonl.gz")) if word in file.name]
    if len(found) != 1:
        sys.exit(f"error: {len(found)} files in {sources} have {word!r} in their name; there must be one")
    with gzip.open(found[0], "rt") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines, the same bytes whenever it is called."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as out:
        for row in rows:
            out.write((json.dumps(row) + "\n").encode())
    print(f"{len(rows):,} rows: {file}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/smollm2/make_curve_inputs.py SOURCES DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
