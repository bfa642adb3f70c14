"""Print how much adapters forgot, as PEFT's comparison on MetaMathQA measures it.

python recipes/peft_metamathqa/forgetting.py runs/board/wikipedia.jsonl.gz runs/peft-metamathqa/runs/*/

Forgetting is the mean cross-entropy of the model with the adapter minus that of the same model with the adapter off.
The mean is over all tokens of all texts but the first of each; texts are cut at 768 tokens and have no end token.
Losses are in float32, where PEFT rounds each token's loss to the model's dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel

import maskft  # noqa: F401 - registers masks with PEFT, which could not load them without it
from maskft.data.sources import read_file
from maskft.loss import mean_nll, nll_per_item
from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.layout import holds_adapter

MAX_TOKENS = 768
BATCH_SIZE = 4


def forgetting(model: PeftModel, tokenizer, texts: list[str]) -> float:
    """Return nats per token, after minus before."""
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:MAX_TOKENS]
        if not ids:
            continue  # an empty text
        labels = [-100, *ids[1:]]  # nothing predicts the first token
        rows.append({"input_ids": ids, "labels": labels})

    after = mean_nll(nll_per_item(model, rows, batch_size=BATCH_SIZE))
    with model.disable_adapter():
        before = mean_nll(nll_per_item(model, rows, batch_size=BATCH_SIZE))
    return after - before


def main() -> None:
    """Load each adapter over its base and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="JSON lines, maybe gzipped, with a column text")
    parser.add_argument("adapters", nargs="+", type=Path, help="adapter folders; folders of whole models are left out")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = []
    for place, row in read_file(args.texts):
        if "text" not in row:
            raise UserError(f"{args.texts}, {place}: no column 'text'")
        texts.append(row["text"])
    if not any(texts):
        raise UserError(f"{args.texts} has no text")

    for folder in args.adapters:
        # The shell's pattern also matches full fine-tunings.
        if not holds_adapter(folder):
            print(f"{folder}: no adapter", file=sys.stderr)
            continue
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        model = load_model(base, "auto").to(device)
        model = PeftModel.from_pretrained(model, str(folder))
        value = forgetting(model, load_tokenizer(base), texts)
        print(json.dumps({"adapter": str(folder), "forgetting": value}))


if __name__ == "__main__":
    run_script(main)
