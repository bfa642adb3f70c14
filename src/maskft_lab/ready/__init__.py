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

QUESTIONS = "questions.jsonl"  # of a folder: prompt and answer
_FOLDER = Path(__file__).parent
_DEFAULT = "sums"
_WIDTH = 24  # of a column
_MAX_NEW_TOKENS = 12


def ready_masks() -> dict[str, Path]:
    """Task -> folder of the masks that come with the package."""
    return {file.parent.name: file.parent for file in sorted(_FOLDER.glob(f"*/{ADAPTER_WEIGHTS}"))}


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
    model = PeftModel.from_pretrained(base, folder).eval()
    return model, load_tokenizer(EMBEDDED_MODEL)


def answer(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The first line of the model's greedy answer to ``prompt``."""
    (text,) = _answers(model, tokenizer, [prompt])
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


def show(folder: Path, name_or_path: str = EMBEDDED_MODEL) -> list[str]:
    """Ask a model five questions with and without a mask; returns lines of at most 80 columns.

    Args:
        folder: Adapter folder with its questions.
        name_or_path: Its base model.
    """
    questions = [json.loads(line) for line in (folder / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    prompts = [question["prompt"] for question in questions]
    tokenizer = load_tokenizer(name_or_path)
    model = PeftModel.from_pretrained(load_model(name_or_path, "float32"), folder).eval()
    masks = MaskSet.from_adapter(folder)
    size = (folder / ADAPTER_WEIGHTS).stat().st_size
    masked = _answers(model, tokenizer, prompts)
    with model.disable_adapter():
        plain = _answers(model, tokenizer, prompts)
    rows = [("question", "without the mask", "with the mask"), *zip(prompts, plain, masked, strict=True)]
    asked = [question["answer"].split() for question in questions]
    right = [
        sum(answer.split()[: len(words)] == words for words, answer in zip(asked, answers, strict=True))
        for answers in (plain, masked)
    ]
    return [
        *("  ".join(_fit(cell) for cell in row).rstrip() for row in rows),
        f"correct: {right[0]} of {len(questions)}; {right[1]} with the mask, {8 * size:,} bits that remove "
        f"{masks.num_removed:,} weights",
    ]


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
        raise UserError(f"no ready mask {task}; there are: {', '.join(masks) or 'none in this installation'}")
    return masks[task]


def _answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """The answers to all of them at once."""
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        out = model.generate(**tokens, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _fit(text: str) -> str:
    """One line of a column's width."""
    text = " ".join(text.split())
    return f"{text if len(text) <= _WIDTH else text[: _WIDTH - 1] + '…':<{_WIDTH}}"
