"""Write the inputs of study_curve_*.yaml: probes of earlier abilities, intents, word problems and programs.

python recipes/smollm2/make_curve_inputs.py SOURCES runs/curve

SOURCES is a folder (with folders) of ``.jsonl.gz`` files, one for each word in its name:

- ``dolly``: rows of databricks-dolly-15k (CC-BY-SA-3.0) as ``messages``
- ``wikitext``: paragraphs of WikiText-2 (CC-BY-SA), column ``text``
- ``banking77_train``, ``banking77_test``: Banking77 (CC-BY-4.0), columns ``prompt``, ``completion`` and ``answer``
- ``mawps_train``, ``mawps_test``: word problems of MAWPS, the same columns
- ``codegen``: short programs of GPTeacher's code part (MIT) as ``messages``

The sums come from ``python recipes/small/make_inputs.py runs/curve``. Probes that choose a point of a path have other
rows than those that are reported; so have the prompts on which the KL divergence to the base is measured.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from maskft.data.sources import read_file
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_rows

SEED = 0
LENGTHS = range(160, 700)  # characters of an instruction with its answer, as JSON
CODE_LENGTHS = range(160, 420)  # characters of a program with its instruction, as JSON
NUM_CHOOSE = 24  # rows of a probe
NUM_REPORT = 50
NUM_REPLAY = 63  # 5 % of the rows beside 1,200 of a task
NUM_PROMPTS = 48
# Training rows, of which a study holds some out, and test rows.
SIZES = {"banking77": (1_200, 600), "mawps": (1_200, 400)}
CODE_TRAIN = 600
CODE_TEST = 150


def main(sources: Path, folder: Path) -> None:
    """Write the probes and, for each task, training rows, test rows and prompts."""
    # One generator for all files: the rows of a later file depend on the draws before it.
    rng = random.Random(SEED)
    instructions = of_length(read(sources, "dolly"), LENGTHS)
    paragraphs = read(sources, "wikitext")
    write_probe(folder, "instructions", instructions, rng)
    write_probe(folder, "wikipedia", paragraphs, rng)

    # Instructions that no probe has, to mix into the rows of a task.
    first = NUM_CHOOSE + NUM_REPORT
    replay = []
    for row in instructions[first : first + NUM_REPLAY]:
        replay.append(in_chat(row["messages"]))
    write(folder / "instructions_replay.jsonl.gz", replay)

    for task, (num_train, num_test) in SIZES.items():
        train = read(sources, f"{task}_train")
        test = read(sources, f"{task}_test")
        rng.shuffle(train)
        rng.shuffle(test)
        # Leave out test rows that are training rows as well, so that no answer is known by heart.
        trained = {row["prompt"] for row in train}
        test = [row for row in test if row["prompt"] not in trained]
        train = train[: num_train + NUM_PROMPTS]
        write_task(folder, task, train, test[:num_test])

    programs = of_length(read(sources, "codegen"), CODE_LENGTHS)
    rng.shuffle(programs)
    num_train = CODE_TRAIN + NUM_PROMPTS
    train = programs[:num_train]
    test = programs[num_train : num_train + CODE_TEST]
    write_task(folder, "code", train, test)


def of_length(rows: list[dict], lengths: range) -> list[dict]:
    """Return the rows whose JSON has one of these lengths, in characters."""
    found = []
    for row in rows:
        length = len(json.dumps(row))
        if length in lengths:
            found.append(row)
    return found


def write_probe(
    folder: Path,
    name: str,
    rows: list[dict],
    rng: random.Random,
) -> None:
    """Shuffle the rows in place, and write those that choose a point of a path and those that are reported."""
    rng.shuffle(rows)
    end = NUM_CHOOSE + NUM_REPORT
    write(folder / f"{name}_choose.jsonl.gz", rows[:NUM_CHOOSE])
    write(folder / f"{name}_report.jsonl.gz", rows[NUM_CHOOSE:end])


def write_task(
    folder: Path,
    task: str,
    train: list[dict],
    test: list[dict],
) -> None:
    """Write a task's rows; the last training rows become the prompts on which the KL to the base is measured."""
    write(folder / f"{task}_train.jsonl.gz", train[:-NUM_PROMPTS])
    write(folder / f"{task}_prompts.jsonl.gz", train[-NUM_PROMPTS:])
    write(folder / f"{task}_test.jsonl.gz", test)


def in_chat(messages: list[dict]) -> dict:
    """Return a row as the plain text that SmolLM2's template writes.

    The rows of a task are plain text, and ``maskft train`` does not mix chats with plain text.
    """
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = [{"role": "system", "content": system}, *messages[:-1]]
    prompt = ""
    for turn in turns:
        prompt += f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    return {"prompt": prompt, "completion": messages[-1]["content"]}


def read(sources: Path, word: str) -> list[dict]:
    """Return the rows of the one file with ``word`` in its name."""
    files = sorted(sources.rglob("*.jsonl.gz"))
    found = [file for file in files if word in file.name]
    if len(found) != 1:
        raise UserError(f"{len(found)} files in {sources} have {word!r} in their name; there must be one")
    return [row for _, row in read_file(found[0])]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows and say how many."""
    write_rows(file, rows)
    print(f"{len(rows):,} rows: {file}")


def command() -> None:
    """Write the inputs from and into the folders on the command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/smollm2/make_curve_inputs.py SOURCES DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(command)
