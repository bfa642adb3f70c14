"""Write what study.yaml needs: the rows of PEFT's comparison on MetaMathQA, in its text.

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

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MOST_CHARACTERS = 1300  # of query and response; longer rows are left out
NUM_VALID, NUM_TEXTS = 50, 100


def main(sources: Path, folder: Path) -> None:
    """Write rows to train on, to choose a step by, to test on, and text that was known before."""
    pairs = [(row["query"], row["response"]) for row in read(sources, "metamath")]
    kept = [(query, response) for query, response in pairs if len(f"{query} {response}") <= MOST_CHARACTERS]
    write(folder / "metamathqa.jsonl.gz", [{"text": TEMPLATE.format(query=q) + r} for q, r in kept])
    questions = read(sources, "gsm8k_train")
    order = np.arange(len(questions))
    np.random.RandomState(0).shuffle(order)
    chosen = [questions[index] for index in order[:NUM_VALID]]
    write(
        folder / "gsm8k_valid.jsonl.gz",
        [{"text": TEMPLATE.format(query=row["question"]) + row["answer"]} for row in chosen],
    )
    write(folder / "gsm8k_test.jsonl.gz", [asked(row) for row in read(sources, "gsm8k_test")])
    texts = [{"text": row["text"]} for row in read(sources, "finewiki")[:NUM_TEXTS]]
    write(folder / "wikipedia.jsonl.gz", texts)


def asked(row: dict) -> dict:
    """Return a question with the number that answers it."""
    number = row["answer"].rpartition("####")[-1].strip()
    prompt = TEMPLATE.format(query=row["question"])
    return {"prompt": prompt, "completion": row["answer"], "answer": number, "answer_type": "number"}


def read(sources: Path, word: str) -> list[dict]:
    """Return the rows of the one file with ``word`` in its name."""
    found = [
        f for f in sorted(sources.rglob("*")) if word in f.name.lower() and f.name.endswith((".jsonl", ".jsonl.gz"))
    ]
    if len(found) != 1:
        sys.exit(f"error: {len(found)} files in {sources} have {word!r} in their name; there must be one")
    with (gzip.open if found[0].suffix == ".gz" else open)(found[0], "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines, the same bytes whenever it is called."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{file}: {len(rows):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/peft_metamathqa/make_inputs.py SOURCES FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
