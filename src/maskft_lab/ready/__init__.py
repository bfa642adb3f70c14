"""Masks that come with the package, each in a folder with its card and five questions, and what they change."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import maskft  # noqa: F401 - registers the method with PEFT
from maskft.masks.mask_set import MaskSet
from maskft.models import load_model, load_tokenizer
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS, EMBEDDED_MODEL

# In the folder of each mask: lines with a prompt and its answer.
QUESTIONS = "questions.jsonl"

_FOLDER = Path(__file__).parent
_DEFAULT = "sums"
# Characters of a column: three columns with two blanks between them fit a terminal of 80.
_WIDTH = 24
_MAX_NEW_TOKENS = 12


def ready_masks() -> dict[str, Path]:
    """Task -> folder of the masks that come with the package."""
    # A folder without weights, as of a stripped installation, holds no mask.
    files = sorted(_FOLDER.glob(f"*/{ADAPTER_WEIGHTS}"))
    return {file.parent.name: file.parent for file in files}


def load(task: str | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a ready mask over its base model.

    Args:
        task: Its name, see :func:`ready_masks`; default: sums.

    Returns:
        The masked model in evaluation mode (float32, on the CPU), and its tokenizer.

    Raises:
        UserError: If there is no such mask, or its base model is not installed.
    """
    folder = ready_mask(task)
    base = load_model(EMBEDDED_MODEL, "float32")
    model = PeftModel.from_pretrained(base, folder)
    model.eval()
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    return model, tokenizer


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
) -> str:
    """The first line of the model's greedy answer to ``prompt``, of at most 12 tokens; empty if it answers nothing."""
    (text,) = _answers(model, tokenizer, [prompt])
    # The model does not always stop after its answer; it goes on in the next line.
    lines = text.strip().splitlines()
    if not lines:
        return ""
    return lines[0]


def show(folder: Path, name_or_path: str = EMBEDDED_MODEL) -> list[str]:
    """Ask a model five questions with and without a mask; returns lines of at most 80 columns.

    Args:
        folder: Adapter folder with its questions.
        name_or_path: Its base model.
    """
    text = (folder / QUESTIONS).read_text(encoding="utf-8")
    prompts: list[str] = []
    expected: list[str] = []
    for line in text.splitlines():
        question = json.loads(line)
        prompts.append(question["prompt"])
        expected.append(question["answer"])

    # One model for both: the base is the model with its adapter off.
    tokenizer = load_tokenizer(name_or_path)
    base = load_model(name_or_path, "float32")
    model = PeftModel.from_pretrained(base, folder)
    model.eval()
    masked = _answers(model, tokenizer, prompts)
    # The same weights without the mask.
    with model.disable_adapter():
        plain = _answers(model, tokenizer, prompts)

    # The table
    rows = [("question", "without the mask", "with the mask")]
    rows += zip(prompts, plain, masked, strict=True)
    lines: list[str] = []
    for row in rows:
        cells = [_fit(cell) for cell in row]
        line = "  ".join(cells)
        lines.append(line.rstrip())

    # The summary: answers, and the size of the mask's file, which is all that has to be shipped.
    num_right = _num_right(plain, expected)
    num_right_masked = _num_right(masked, expected)
    num_bytes = (folder / ADAPTER_WEIGHTS).stat().st_size
    num_bits = 8 * num_bytes
    num_removed = MaskSet.from_adapter(folder).num_removed
    lines.append(
        f"correct: {num_right} of {len(prompts)}; {num_right_masked} with the mask, {num_bits:,} bits that remove "
        f"{num_removed:,} weights"
    )
    return lines


def snippet(folder: Path, name_or_path: str = EMBEDDED_MODEL) -> list[str]:
    """The lines of Python that load a mask over its base."""
    return [
        "The same in Python:",
        "  from peft import PeftModel; import maskft.models, maskft_lab.ready",
        f'  model = maskft.models.load_model("{name_or_path}")',
        f'  model = PeftModel.from_pretrained(model, maskft_lab.ready.ready_mask("{folder.name}"))',
    ]


def ready_mask(task: str | None = None) -> Path:
    """Folder of a mask, by default that of sums.

    Raises:
        UserError: If there is no such mask.
    """
    task = task or _DEFAULT
    masks = ready_masks()
    if task not in masks:
        # An installation may have been stripped of its data files.
        available = ", ".join(masks) or "none in this installation"
        raise UserError(f"no ready mask {task}; there are: {available}")
    return masks[task]


def _answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
) -> list[str]:
    """The greedy answers to all prompts, in one batch."""
    # Padded on the left, so that every answer begins right after its prompt.
    tokens = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(model.device)
    with torch.inference_mode():
        # B prompts of T tokens, padding and answers included.
        ids_BT = model.generate(
            **tokens,
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    # generate() returns each prompt with its answer.
    prompt_length = tokens["input_ids"].shape[1]
    answers_BT = ids_BT[:, prompt_length:]
    return tokenizer.batch_decode(answers_BT, skip_special_tokens=True)


def _num_right(answers: list[str], expected: list[str]) -> int:
    """The number of answers that begin with the words that are expected."""
    num_right = 0
    for answer, right in zip(answers, expected, strict=True):
        words = right.split()
        # The model does not always stop after its answer, and what follows does not count.
        first_words = answer.split()[: len(words)]
        num_right += first_words == words
    return num_right


def _fit(text: str) -> str:
    """One line of a column's width, cut or filled with blanks."""
    # An answer may have several lines, which would break the table.
    text = " ".join(text.split())
    if len(text) > _WIDTH:
        text = text[: _WIDTH - 1] + "…"
    return text.ljust(_WIDTH)
