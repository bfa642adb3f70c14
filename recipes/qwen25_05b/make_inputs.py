"""Write the inputs of study_gsm8k.yaml: short exercises of GSM8K to train on, and the first 500 of its test.

python recipes/qwen25_05b/make_inputs.py SOURCES runs/curve

SOURCES is a folder (with folders) with train.jsonl and test.jsonl of github.com/openai/grade-school-math (MIT), gzipped
or not, whose names contain ``gsm8k_train`` and ``gsm8k_test``. Solutions lose the annotations for a calculator, such as
<<48/2=24>>. Training rows are exercises of at most 350 characters, question and solution together: 95 tokens of Qwen2.5
instead of 150, so that a CPU core sees more of them in an hour. The test's exercises have any length.
"""

from __future__ import annotations

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
MAX_CHARACTERS = 350
NUM_TRAIN = 612  # 100 of them are held out
NUM_TEST = 500


def main(sources: Path, folder: Path) -> None:
    """Write gsm8k_train.jsonl.gz and gsm8k_test.jsonl.gz."""
    train = [exercise(row) for row in read(sources, "gsm8k_train")]
    short = [row for row in train if len(row["prompt"]) + len(row["completion"]) <= MAX_CHARACTERS]
    random.Random(SEED).shuffle(short)
    test = [exercise(row) for row in read(sources, "gsm8k_test")]
    write(folder / "gsm8k_train.jsonl.gz", short[:NUM_TRAIN])
    write(folder / "gsm8k_test.jsonl.gz", test[:NUM_TEST])


def exercise(row: dict) -> dict:
    """Return a question and its solution as a prompt, its completion and the number that is checked."""
    solution = re.sub(r"<<.*?>>", "", row["answer"])
    number = solution.rpartition("####")[2].strip()
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {solution}", "answer": number}


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
