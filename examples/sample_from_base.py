"""Let a base model write text itself: rows for ``--kl_dataset_name`` if you have none of your own.

python examples/sample_from_base.py my-model own_text.jsonl --num_rows 256
maskft train ... --kl_budget 0.1 --kl_dataset_name own_text.jsonl

Each row begins after the tokenizer's first token and is sampled at temperature 1, so that the rows follow the base's
own distribution of text.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from rich.progress import track
from transformers import GenerationConfig

from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError
from maskft_common.files import write_text

BATCH_SIZE = 32


def main() -> None:
    """Sample rows and write them as JSON lines with a column ``text``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder or a hub name")
    parser.add_argument("file", type=Path, help="file to write, JSON lines")
    parser.add_argument("--num_rows", type=positive, default=256, help="rows to write (default: 256)")
    parser.add_argument("--num_tokens", type=positive, default=64, help="longest row, in tokens (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="dtype of the weights; auto: as they are stored (default: float32)",
    )
    args = parser.parse_args()
    # All of this before the model samples for minutes.
    if args.file.exists():
        raise UserError(f"{args.file} already exists: delete it or choose another name")
    if args.num_tokens < 2:
        raise UserError("--num_tokens 1: give at least 2, because the first token of a row is not sampled")
    folder = args.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: choose another folder for {args.file.name}")

    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.base, args.dtype).to(device).eval()

    # `generate` needs a first token. Where a tokenizer has no BOS, EOS plays its part in pre-training: it is the token
    # before each document.
    first_token = tokenizer.bos_token_id
    if first_token is None:
        first_token = tokenizer.eos_token_id
    if first_token is None:
        raise UserError(f"the tokenizer of {args.base} has no BOS and no EOS token, after which a row could begin")

    # Only the tokens that end a text are left of generation_config.json. Filters, a temperature or a penalty for
    # repetition, as many instruct models have, would change the distribution, which the rows are to represent.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)

    texts = []
    for start in track(range(0, args.num_rows, BATCH_SIZE), description="sampling"):
        num_rows = min(BATCH_SIZE, args.num_rows - start)
        prompt_B1 = torch.full((num_rows, 1), first_token, device=device)
        sampled_BT = model.generate(
            input_ids=prompt_B1,
            attention_mask=torch.ones_like(prompt_B1),
            do_sample=True,
            temperature=1.0,
            top_k=0,  # transformers' own default is 50
            max_new_tokens=args.num_tokens - 1,  # the first token counts as well
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(sampled_BT, skip_special_tokens=True)

    # Leave out rows that ended at once: they have no token on which a KL divergence could be measured.
    texts = [text for text in texts if text.strip()]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    write_text(args.file, "".join(lines))
    print(f"{len(texts)} rows: {args.file}")


if __name__ == "__main__":
    run_script(main)
