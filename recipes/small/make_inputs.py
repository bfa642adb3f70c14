"""Write the inputs of study_products.yaml: a random model of 0.9 M parameters, additions to train it on, and products.

python recipes/small/make_inputs.py runs/small
python recipes/small/make_inputs.py runs/small-1 1     # another initialisation, other rows, another split

Also sums of two numbers of two digits, for recipes/smollm2/study_sums.yaml; sums_all_train.jsonl.gz has all of them but
the test's and those of sums_prompts.jsonl.gz, for the mask that comes with maskft (recipes/smollm2/ready_sums.sh).
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskft_common.command_line import run_script
from maskft_common.files import write_rows

NUM_ADDITIONS = 20_000
NUM_TRAIN = 2_700  # products; the study holds out 700 of them
NUM_SUMS = 1_200  # study_sums.yaml holds out 200 of them
NUM_TEST_SUMS = 1_000
NUM_SUM_PROMPTS = 64  # on which the KL divergence to the base is measured
CHARACTERS = "0123456789+*= "


def main(folder: Path, seed: int = 0) -> None:
    """Write the model, its tokenizer (a token per character) and files of exercises."""
    tokenizer().save_pretrained(folder / "model")
    random_model(seed).save_pretrained(folder / "model")

    # One generator for all files: the rows of a later file depend on the draws before it.
    rng = random.Random(seed)
    # Numbers of three digits.
    numbers = range(100, 1000)
    pairs = list(itertools.product(numbers, numbers))
    additions = rng.sample(pairs, NUM_ADDITIONS)
    write(folder / "additions.jsonl.gz", [addition(a, b) for a, b in additions])

    # Three digits times one.
    products = list(itertools.product(numbers, range(2, 10)))
    rng.shuffle(products)
    rows = [exercise(f"{a} * {b} =", a * b) for a, b in products]
    write(folder / "products_train.jsonl.gz", rows[:NUM_TRAIN])
    write(folder / "products_test.jsonl.gz", rows[NUM_TRAIN:])

    # Numbers of two digits: training rows, test rows, prompts, and the rest.
    numbers = range(10, 100)
    sums = list(itertools.product(numbers, numbers))
    rng.shuffle(sums)
    rows = [addition(a, b) for a, b in sums]
    end_of_test = NUM_SUMS + NUM_TEST_SUMS
    end_of_prompts = end_of_test + NUM_SUM_PROMPTS
    write(folder / "sums_train.jsonl.gz", rows[:NUM_SUMS])
    write(folder / "sums_test.jsonl.gz", rows[NUM_SUMS:end_of_test])
    write(folder / "sums_prompts.jsonl.gz", rows[end_of_test:end_of_prompts])
    write(folder / "sums_all_train.jsonl.gz", rows[:NUM_SUMS] + rows[end_of_prompts:])


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character."""
    tokens = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    # Words of one character, joined without spaces.
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def random_model(seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of width 128 and four layers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3 + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def exercise(prompt: str, answer: int) -> dict:
    """Return a row: prompt, completion, and the answer to check a generated one against."""
    return {
        "prompt": prompt,
        "completion": f" {answer}",
        "answer": str(answer),
        "answer_type": "number",
    }


def addition(a: int, b: int) -> dict:
    """Return a sum as a row."""
    return exercise(f"{a} + {b} =", a + b)


def write(file: Path, rows: list[dict]) -> None:
    """Write rows and say how many."""
    write_rows(file, rows)
    print(f"{len(rows):,} rows: {file}")


def command() -> None:
    """Write the inputs into the folder on the command line."""
    words = sys.argv[1:]
    if len(words) == 1:
        words.append("0")
    if len(words) != 2 or not words[1].isdecimal():
        sys.exit("usage: python recipes/small/make_inputs.py DIR [SEED] (DIR gets the model and the data)")
    main(Path(words[0]), int(words[1]))


if __name__ == "__main__":
    run_script(command)
