"""Write what study_gsm8k.yaml and study_code.yaml need: a random Llama of 1 M parameters, its tokenizer, three texts.

python recipes/text/make_inputs.py SOURCES runs/text

SOURCES is a folder (with folders) of ``.jsonl`` or ``.json`` files, gzipped or not, one for each word in its name:

- ``gsm8k_train`` and ``gsm8k_test``: train.jsonl and test.jsonl of github.com/openai/grade-school-math (MIT)
- ``codegen``: codegen-instruct.json of github.com/teknium1/GPTeacher (MIT)
- ``dolly``: databricks-dolly-15k.jsonl, or a part of it, of huggingface.co/datasets/databricks/databricks-dolly-15k
  (CC-BY-SA-3.0); the first 2,000 rows are used
- ``instruction``: instruction-data.json of github.com/rasbt/LLMs-from-scratch (Apache-2.0)
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
NUM_DOLLY = 2_000
VOCAB_SIZE = 1_024
MAX_TOKENS = 160  # of a row, end included; longer exercises are left out, longer instructions cut in pieces
NUM_TRAIN, NUM_TEST, NUM_BEFORE, NUM_CODE_TEST = 406, 300, 75, 1_000

Pair = tuple[str, str]  # a question and its answer


def main(sources: Path, folder: Path) -> None:
    """Write the model, its tokenizer, the text it is trained on first, and training and test rows of two domains."""
    rng = random.Random(SEED)
    instructions = read(sources, "dolly")[:NUM_DOLLY] + read(sources, "instruction")
    rng.shuffle(instructions)
    texts = ["".join(as_texts(pair)) for pair in instructions]
    before, texts = texts[:NUM_BEFORE], texts[NUM_BEFORE:]
    math, math_test = (shuffled(without_annotations(read(sources, f"gsm8k_{n}")), rng) for n in ("train", "test"))
    code = shuffled(read(sources, "codegen"), rng)
    code, code_test = code[NUM_CODE_TEST:], code[:NUM_CODE_TEST]

    tokenizer = train_tokenizer([*texts, *("".join(as_texts(pair)) for pair in math + code)])
    tokenizer.save_pretrained(folder / "model")
    random_model().save_pretrained(folder / "model")
    for name, of_part in (("train", texts), ("before", before)):
        rows = [{"text": piece} for text in of_part for piece in pieces(text, tokenizer)]
        write(folder / f"instructions_{name}.jsonl.gz", rows)
    for name, pairs, num_rows in (
        ("gsm8k_train", math, NUM_TRAIN),
        ("gsm8k_test", math_test, NUM_TEST),
        ("code_train", code, NUM_TRAIN),
        ("code_test", code_test, NUM_TEST),
    ):
        write(folder / f"{name}.jsonl.gz", exercises(pairs, tokenizer)[:num_rows])


def as_texts(pair: Pair) -> tuple[str, str]:
    """Return what is given and what is to follow."""
    question, answer = pair
    return f"Question: {question}\nAnswer:", f" {answer}"


def without_annotations(pairs: list[Pair]) -> list[Pair]:
    """Return solutions without what is meant for a calculator, such as <<48/2=24>>."""
    return [(question, re.sub(r"<<.*?>>", "", answer)) for question, answer in pairs]


def shuffled(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """Return the pairs in random order, no question twice."""
    unique = list(dict(pairs).items())
    rng.shuffle(unique)
    return unique


def read(sources: Path, word: str) -> list[Pair]:
    """Return questions and answers of the one file with ``word`` in its name, whichever names its columns have."""
    found = [f for f in sorted(sources.rglob("*")) if word in f.name.lower() and re.search(r"\.jsonl?(\.gz)?$", f.name)]
    if len(found) != 1:
        sys.exit(f"error: {len(found)} files in {sources} have {word!r} in their name; there must be one")
    content = found[0].read_bytes()
    text = (gzip.decompress(content) if found[0].suffix == ".gz" else content).decode()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return [pair(row) for row in rows]


def pair(row: dict) -> Pair:
    """Return the question of a row, with the passage or input it is about, and its answer."""
    if "messages" in row:
        row = {message["role"]: message["content"] for message in row["messages"]}
    question = next(row[key] for key in ("user", "question", "instruction") if key in row)
    about = row.get("input") or row.get("context")
    answer = next(row[key] for key in ("assistant", "answer", "response", "output") if key in row)
    return (f"{question}\n\n{about}" if about else question).strip(), answer.strip()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of these texts; each digit is a token."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def random_model() -> LlamaForCausalLM:
    """Return a Llama of width 128 and four layers."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pieces(text: str, tokenizer: PreTrainedTokenizerFast):
    """Yield a text in pieces that the model can take."""
    tokens = tokenizer.encode(text)
    for start in range(0, len(tokens), MAX_TOKENS - 1):
        yield tokenizer.decode(tokens[start : start + MAX_TOKENS - 1])


def exercises(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Return the exercises that fit into the model."""
    rows = [dict(zip(("prompt", "completion"), as_texts(pair), strict=True)) for pair in pairs]
    fitting = [row for row in rows if len(tokenizer.encode("".join(row.values()))) < MAX_TOKENS]
    print(f"{len(fitting):,} of {len(pairs):,} exercises have less than {MAX_TOKENS} tokens")
    return fitting


def write(file: Path, rows: list[dict]) -> None:
    """Write rows as gzipped JSON lines, the same bytes whenever it is called."""
    with open(file, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as out:
        for row in rows:
            out.write((json.dumps(row) + "\n").encode())
    print(f"{len(rows):,} rows: {file}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/text/make_inputs.py SOURCES DIR (DIR gets the model and the data)")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
