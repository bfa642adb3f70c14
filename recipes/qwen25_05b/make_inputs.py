"""Write the inputs of study_gsm8k.yaml, study_code.yaml and study_instruction.yaml.

python recipes/qwen25_05b/make_inputs.py SOURCES runs/curve

SOURCES is a folder (with folders) with these .jsonl files, gzipped or not, which parts of their names tell:

- ``gsm8k_train`` and ``gsm8k_test``: train.jsonl and test.jsonl of github.com/openai/grade-school-math (MIT).
- ``codegen``: programs of GPTeacher's code part (MIT) as ``messages``. Those that share text with HumanEval should be
  left out.
- ``short_instructions``: the instructions of github.com/rasbt/LLMs-from-scratch (Apache-2.0) as ``messages``.

gsm8k_train.jsonl.gz and gsm8k_test.jsonl.gz: solutions lose the annotations for a calculator, such as <<48/2=24>>.
Training rows are exercises of at most 350 characters, question and solution together: 95 tokens of Qwen2.5 instead of
150, so that a CPU core sees more of them in an hour. The test has its first 500 exercises, of any length.

python_train.jsonl.gz and python_test.jsonl.gz: programs in Python that define a function, of at most 600 characters
with the request for them. The request is the docstring that begins the program, so a model continues a file, as
HumanEval has it do.

instruction_train.jsonl.gz and instruction_test.jsonl.gz: short instructions with their answers, each instruction once.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import sys
from pathlib import Path

from maskft.data.sources import read_file
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_bytes

SEED = 0
MAX_CHARACTERS_OF_EXERCISE = 350
MAX_CHARACTERS_OF_PROGRAM = 600
NUM_TRAIN = 612  # 100 of them are held out
NUM_TEST = 500
NUM_TEST_INSTRUCTIONS = 200


def main(sources: Path, folder: Path) -> None:
    """Write a training file and a test file of exercises, of programs and of instructions."""
    # All sources are read before anything is written: one may be missing.
    exercises = [exercise(row) for row in read(sources, "gsm8k_train")]
    test_exercises = [exercise(row) for row in read(sources, "gsm8k_test")]
    programs = [program(row["messages"]) for row in read(sources, "codegen")]
    # For study_instruction.yaml alone.
    has_instructions = any("short_instructions" in file.name for file in sources.rglob("*"))
    instructions = read(sources, "short_instructions") if has_instructions else []

    short_exercises = short_rows(exercises, MAX_CHARACTERS_OF_EXERCISE)
    write(folder / "gsm8k_train.jsonl.gz", short_exercises[:NUM_TRAIN])
    write(folder / "gsm8k_test.jsonl.gz", test_exercises[:NUM_TEST])

    # The test has the programs that are not in training.
    functions = [row for row in programs if row is not None]
    short_programs = short_rows(functions, MAX_CHARACTERS_OF_PROGRAM)
    write(folder / "python_train.jsonl.gz", short_programs[:NUM_TRAIN])
    write(folder / "python_test.jsonl.gz", short_programs[NUM_TRAIN:])

    if not has_instructions:
        print(f"no short_instructions in {sources}: the inputs of study_instruction.yaml are left out")
        return
    # Some are asked twice: the test must have none that training has.
    unique = {row["messages"][0]["content"]: row for row in instructions}
    shuffled = list(unique.values())
    random.Random(SEED).shuffle(shuffled)
    write(folder / "instruction_train.jsonl.gz", shuffled[:NUM_TRAIN])
    write(folder / "instruction_test.jsonl.gz", shuffled[NUM_TRAIN : NUM_TRAIN + NUM_TEST_INSTRUCTIONS])


def short_rows(rows: list[dict], max_characters: int) -> list[dict]:
    """Return the rows of at most ``max_characters``, prompt and completion together, shuffled."""
    short = [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= max_characters]
    random.Random(SEED).shuffle(short)
    return short


def exercise(row: dict) -> dict:
    """Return a question and its solution as a prompt, its completion and the number that is checked."""
    solution = re.sub(r"<<.*?>>", "", row["answer"])
    number = solution.rpartition("####")[2].strip()
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {solution}", "answer": number}


def program(messages: list[dict]) -> dict | None:
    """Return a request as a docstring and the program that follows it; None if it is no program in Python."""
    if len(messages) != 2:
        return None
    request, answer = (message["content"] for message in messages)
    if "def " not in answer:
        return None
    text = f'"""\n{request}\n"""\n'
    try:
        ast.parse(text + answer)
    except SyntaxError:
        # Another language, or a request with quotation marks that end its docstring.
        return None
    return {"prompt": text, "completion": answer}


def read(sources: Path, word: str) -> list[dict]:
    """Return the rows of the one .jsonl file, gzipped or not, with ``word`` in its name."""
    found = []
    for file in sorted(sources.rglob("*")):
        is_rows = re.search(r"\.jsonl(\.gz)?$", file.name)
        if is_rows and word in file.name:
            found.append(file)
    if len(found) != 1:
        raise UserError(f"{len(found)} .jsonl files in {sources} have {word!r} in their name; there must be one")
    return [row for _, row in read_file(found[0])]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines, the same bytes each time."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_bytes(file, gzip.compress(text.encode(), mtime=0))
    print(f"{file}: {len(rows):,} rows")


def command() -> None:
    """Write the inputs from and into the folders on the command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/qwen25_05b/make_inputs.py SOURCES DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(command)
