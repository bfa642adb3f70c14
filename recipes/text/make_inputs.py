"""Write the inputs of study_gsm8k.yaml and study_code.yaml: a random Llama of 1 M parameters, its tokenizer, texts.

python recipes/text/make_inputs.py SOURCES runs/text

SOURCES is a folder (with folders) of ``.jsonl`` or ``.json`` files, gzipped or not, one for each word in its name:

- ``gsm8k_train`` and ``gsm8k_test``: train.jsonl and test.jsonl of github.com/openai/grade-school-math (MIT)
- ``codegen``: codegen-instruct.json of github.com/teknium1/GPTeacher (MIT)
- ``dolly``: databricks-dolly-15k.jsonl, or a part of it, of huggingface.co/datasets/databricks/databricks-dolly-15k
  (CC-BY-SA-3.0); the first 2,000 rows are used
- ``instruction``: instruction-data.json of github.com/rasbt/LLMs-from-scratch (Apache-2.0)
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskft.data.sources import read_file
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_rows

SEED = 0
NUM_DOLLY = 2_000
VOCAB_SIZE = 1_024
MAX_TOKENS = 160  # of a row, end included; longer exercises are left out, longer instructions are cut into pieces
NUM_TRAIN = 406  # rows of either domain
NUM_TEST = 300
NUM_BEFORE = 75  # instructions that measure what was forgotten
NUM_CODE_TEST = 1_000  # programs that are kept from training; the first that fit are the test

Pair = tuple[str, str]  # a question and its answer


def main(sources: Path, folder: Path) -> None:
    """Write the model, its tokenizer, the text it is trained on first, and training and test rows of two domains."""
    # One generator for all files: the order of its draws decides their rows.
    rng = random.Random(SEED)
    dolly = read(sources, "dolly")
    instructions = dolly[:NUM_DOLLY] + read(sources, "instruction")
    rng.shuffle(instructions)
    texts = [as_text(pair) for pair in instructions]
    before = texts[:NUM_BEFORE]
    texts = texts[NUM_BEFORE:]

    math = shuffled(without_annotations(read(sources, "gsm8k_train")), rng)
    math_test = shuffled(without_annotations(read(sources, "gsm8k_test")), rng)
    programs = shuffled(read(sources, "codegen"), rng)
    code_test = programs[:NUM_CODE_TEST]
    code = programs[NUM_CODE_TEST:]

    # The tokenizer sees training rows only.
    exercise_texts = [as_text(pair) for pair in math + code]
    tokenizer = train_tokenizer([*texts, *exercise_texts])
    tokenizer.save_pretrained(folder / "model")
    random_model().save_pretrained(folder / "model")

    write(folder / "instructions_train.jsonl.gz", text_rows(texts, tokenizer))
    write(folder / "instructions_before.jsonl.gz", text_rows(before, tokenizer))
    write(folder / "gsm8k_train.jsonl.gz", exercises(math, tokenizer)[:NUM_TRAIN])
    write(folder / "gsm8k_test.jsonl.gz", exercises(math_test, tokenizer)[:NUM_TEST])
    write(folder / "code_train.jsonl.gz", exercises(code, tokenizer)[:NUM_TRAIN])
    write(folder / "code_test.jsonl.gz", exercises(code_test, tokenizer)[:NUM_TEST])


def as_exercise(pair: Pair) -> dict:
    """Return a pair as a row: the prompt, and the completion that follows it."""
    question, answer = pair
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def as_text(pair: Pair) -> str:
    """Return a pair as one text."""
    row = as_exercise(pair)
    return row["prompt"] + row["completion"]


def without_annotations(pairs: list[Pair]) -> list[Pair]:
    """Return solutions without GSM8K's annotations for a calculator, such as <<48/2=24>>."""
    found = []
    for question, answer in pairs:
        plain_answer = re.sub(r"<<.*?>>", "", answer)
        found.append((question, plain_answer))
    return found


def shuffled(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """Return the pairs in random order, no question twice."""
    # A dictionary keeps the place of a question's first answer, and its last answer.
    unique = list(dict(pairs).items())
    rng.shuffle(unique)
    return unique


def read(sources: Path, word: str) -> list[Pair]:
    """Return questions and answers of the one file with ``word`` in its name."""
    found = []
    for file in sorted(sources.rglob("*")):
        is_rows = re.search(r"\.jsonl?(\.gz)?$", file.name)
        if is_rows and word in file.name.lower():
            found.append(file)
    if len(found) != 1:
        raise UserError(f"{len(found)} files in {sources} have {word!r} in their name; there must be one")
    pairs = []
    for place, row in read_file(found[0]):
        try:
            pairs.append(pair_of(row))
        except StopIteration:
            raise UserError(f"{found[0]}, {place}: no question and answer; columns: {', '.join(row)}") from None
    return pairs


def pair_of(row: dict) -> Pair:
    """Return the question of a row, with the passage or input it is about, and its answer.

    The files have different names for them.
    """
    if "messages" in row:
        # A chat of one turn: as if its roles were columns.
        row = {message["role"]: message["content"] for message in row["messages"]}
    question = first_of(row, "user", "question", "instruction")
    answer = first_of(row, "assistant", "answer", "response", "output")
    about = row.get("input") or row.get("context")
    if about:
        question = f"{question}\n\n{about}"
    return question.strip(), answer.strip()


def first_of(row: dict, *keys: str) -> str:
    """Return the value of the first key that a row has."""
    return next(row[key] for key in keys if key in row)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of these texts; each digit is a token, so that all numbers are cut alike."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        # All bytes, so that any text can be encoded; these texts may lack some.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
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


def text_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Return texts as rows, cut into pieces that the model can take."""
    length = MAX_TOKENS - 1  # training adds the end token
    rows = []
    for text in texts:
        tokens = tokenizer.encode(text)
        for start in range(0, len(tokens), length):
            piece = tokenizer.decode(tokens[start : start + length])
            rows.append({"text": piece})
    return rows


def exercises(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Return the exercises that fit into the model."""
    fitting = []
    for pair in pairs:
        num_tokens = len(tokenizer.encode(as_text(pair)))
        if num_tokens < MAX_TOKENS:  # training adds the end token
            fitting.append(as_exercise(pair))
    print(f"{len(fitting):,} of {len(pairs):,} exercises have less than {MAX_TOKENS} tokens")
    return fitting


def write(file: Path, rows: list[dict]) -> None:
    """Write rows and say how many."""
    write_rows(file, rows)
    print(f"{len(rows):,} rows: {file}")


def command() -> None:
    """Write the inputs from and into the folders on the command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/text/make_inputs.py SOURCES DIR (DIR gets the model and the data)")
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(command)
