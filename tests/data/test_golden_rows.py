"""Which rows a seed holds out, their ids and tokens: those of the version that made the published results.

golden_rows.json was printed at commit 15c644f by: PYTHONPATH=tests python tests/data/test_golden_rows.py
"""

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest

from maskft.data.arguments import DataArguments
from maskft.data.splits import load_splits
from maskft.data.tokenizing import tokenize_dataset
from tiny_tokenizer import tiny_tokenizer

SAMPLES = str(Path(__file__).parent / "samples")
CASES = {
    "fraction": {"dataset_name": "sums"},
    "another seed": {"dataset_name": "sums", "split_seed": 7},
    "count": {"dataset_name": "sums", "eval_split_size": 13, "max_train_samples": 40, "max_eval_samples": 9},
    "plain text": {"dataset_name": "sums", "as_chat": False},
    "mixture": {"dataset_name": "sums:30,talks:0.5", "split_seed": 3},
    "mixture, count": {"dataset_name": "sums:50,talks", "eval_split_size": 11},
    "own held-out set": {"dataset_name": "sums:60", "eval_dataset_name": "talks"},
    "registered": {"dataset_name": "metamathqa:7,oasst_guanaco,gsm8k:0.9", "data_dir": SAMPLES, "eval_split_size": 2},
}


def write_files(folder: Path) -> None:
    """A set of sums with copies, and one of conversations."""
    words = random.Random(0)
    people = ("Ada", "Ben", "Cleo", "Dan")
    sums = []
    for n in range(80):
        left, right = words.randrange(20), words.randrange(20)
        question = f"{people[n % 4]} has {left} kites in the shed and buys {right} more; how many kites are there now?"
        sums.append({"question": question, "answer": f"{left} + {right} = {left + right}\n#### {left + right}"})
    sums += sums[5:9]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    talks = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": f"é{n}"},
                {"role": "user", "content": "Again."},
                {"role": "assistant", "content": f"{n}!"},
            ]
        }
        for n in range(24)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in talks))


def rows_of(case: dict, folder: Path) -> dict:
    """The numbers of rows, and digests of their ids and tokens."""
    options = {"data_dir": str(folder), **case}
    args = DataArguments(**options)
    splits = load_splits(args, args.split_seed, tiny_tokenizer())
    out = {}
    for name, rows in (("train", splits.train), ("heldout", splits.heldout)):
        tokens = tokenize_dataset(rows, tiny_tokenizer(), max_length=100)
        content = {"ids": rows["id"][:], "tokens": [tokens["input_ids"][:], tokens["labels"][:]]}
        out[name] = len(rows)
        for key, value in content.items():
            out[f"{name} {key}"] = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
    return out | {key: getattr(splits.report, key) for key in ("read", "dropped_overlap")}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_before(case, tmp_path):
    golden = json.loads((Path(__file__).parent / "golden_rows.json").read_text())
    write_files(tmp_path)
    assert rows_of(CASES[case], tmp_path) == golden[case]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch))
        json.dump({name: rows_of(case, Path(scratch)) for name, case in CASES.items()}, sys.stdout, indent=1)
        print()
