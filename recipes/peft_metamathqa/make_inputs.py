"""Write the inputs of study.yaml: the rows of PEFT's comparison on MetaMathQA, in the same text.

python recipes/peft_metamathqa/make_inputs.py SOURCES runs/board

SOURCES is a folder (with folders) of ``.jsonl`` or ``.jsonl.gz`` files, one for each word in its name:

- ``metamath``: meta-math/MetaMathQA, columns ``query`` and ``response``
- ``gsm8k_train``, ``gsm8k_test``: openai/gsm8k (main), columns ``question`` and ``answer``
- ``finewiki``: the first rows of HuggingFaceFW/finewiki, column ``text``
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np

from maskft.data.sources import read_file
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_bytes

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300  # of query and response; longer rows are left out
NUM_VALID = 50
NUM_TEXTS = 100


def main(sources: Path, folder: Path) -> None:
    """Write training rows, rows that choose a step, test rows, and text that measures forgetting."""
    trained = []
    for row in read(sources, "metamath"):
        query = row["query"]
        response = row["response"]
        num_characters = len(f"{query} {response}")
        if num_characters <= MOST_CHARACTERS:
            trained.append(solved(query, response))
    write(folder / "metamathqa.jsonl.gz", trained)

    # The 50 rows that PEFT's runner draws: it shuffles with this generator and seed.
    questions = read(sources, "gsm8k_train")
    order = np.arange(len(questions))
    np.random.RandomState(0).shuffle(order)
    valid = []
    for index in order[:NUM_VALID]:
        row = questions[index]
        valid.append(solved(row["question"], row["answer"]))
    write(folder / "gsm8k_valid.jsonl.gz", valid)

    tests = [asked(row) for row in read(sources, "gsm8k_test")]
    write(folder / "gsm8k_test.jsonl.gz", tests)
    pages = read(sources, "finewiki")
    texts = [{"text": page["text"]} for page in pages[:NUM_TEXTS]]  # without its other columns
    write(folder / "wikipedia.jsonl.gz", texts)


def solved(query: str, response: str) -> dict:
    """Return a question with its solution as one text."""
    return {"text": TEMPLATE.format(query=query) + response}


def asked(row: dict) -> dict:
    """Return a question with the number that answers it."""
    # Solutions of GSM8K end in "#### NUMBER".
    number = row["answer"].rpartition("####")[-1].strip()
    return {
        "prompt": TEMPLATE.format(query=row["question"]),
        "completion": row["answer"],
        "answer": number,
        "answer_type": "number",
    }


def read(sources: Path, word: str) -> list[dict]:
    """Return the rows of the one file with ``word`` in its name."""
    found = []
    for file in sorted(sources.rglob("*")):
        if word in file.name.lower() and file.name.endswith((".jsonl", ".jsonl.gz")):
            found.append(file)
    if len(found) != 1:
        raise UserError(f"{len(found)} files in {sources} have {word!r} in their name; there must be one")
    return [row for _, row in read_file(found[0])]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # Without a time in the header of gzip, the same rows give the same bytes.
    write_bytes(file, gzip.compress(text.encode(), mtime=0))
    print(f"{file}: {len(rows):,} rows")


def command() -> None:
    """Write the inputs from and into the folders on the command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/peft_metamathqa/make_inputs.py SOURCES FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(command)
