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
    folder.mkdir(parents=True, exist_ok=True)
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
        sys.exit(f"error: {len(found)} .jsonl files in {sources} have {word!r} in their name; there must be one")
    content = found[0].read_bytes()
    if found[0].suffix == ".gz":
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.decode().splitlines() if line]


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines, the same bytes each time."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{file}: {len(rows):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
