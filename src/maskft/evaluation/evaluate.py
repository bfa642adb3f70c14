"""Evaluate a model on held-out items: loss per item, and exact-match accuracy where an answer can be checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..answers import check_answer
from ..data import prompt_ids, tokenize_example
from ..errors import UserError
from .generation import greedy_generate
from .loss import nll_per_item
from .results import build_task, data_sha256, items_fingerprint, metric_from_items

TASK_VERSION = 1


def progress_bar(console=None, disable: bool = False) -> Progress:
    """The progress bar of all evaluations: what, share done, count, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=disable, transient=True)


def evaluate_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    generate: bool | None = None,
    text_field: str = "text",
    console=None,
) -> dict:
    """Held-out loss and, for rows with an ``answer``, accuracy of greedily generated answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        batch_size: Rows per batch.
        max_length: Truncation of the scored sequence in tokens; None: not truncated.
        max_new_tokens: Bound on a generated answer, in tokens.
        generate: Whether to generate answers; None: where every row has one to check.
        text_field: Column of plain text data.
        console: Where the progress bar goes.

    Returns:
        A task record of the result schema, metrics ``nll`` and possibly ``accuracy``.
    """
    rows = list(rows)
    if not rows:
        raise UserError("there are no items to evaluate; check eval_split_size and max_eval_samples")
    checkable = all(row.get("answer") is not None for row in rows)
    if generate and not checkable:
        raise UserError("answers cannot be generated and checked: the data has no `answer` column")
    generate = checkable if generate is None else generate
    tokenized = [tokenize_example(row, tokenizer, max_length=max_length, text_field=text_field) for row in rows]
    prompts = [prompt_ids(row, tokenizer) for row in rows] if generate else None
    with progress_bar(console) as progress:
        bar = progress.add_task("held-out loss", total=len(rows))
        losses = nll_per_item(
            model,
            tokenized,
            batch_size=batch_size,
            pad_token_id=tokenizer.pad_token_id or 0,
            progress=lambda n: progress.advance(bar, n),
        )
        items = [
            {"id": str(row["id"]), "nll": nll if math.isfinite(nll) else None, "num_tokens": count}
            for row, (nll, count) in zip(rows, losses, strict=True)
        ]
        if generate:
            bar = progress.add_task("answers", total=len(rows))
            outputs = greedy_generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_answer=lambda *_: progress.advance(bar),
            )
            for item, row, output in zip(items, rows, outputs, strict=True):
                correct = check_answer(output, row["answer"], row.get("answer_type") or "exact")
                item.update(accuracy=int(correct), answer=row["answer"], output=output)
    kept = [item for item in items if item["num_tokens"] > 0]
    if not kept:
        raise UserError(f"no item has a supervised token within max_length={max_length}; raise it")
    metrics = {name: metric_from_items(kept, name) for name in ("nll", "accuracy") if name in kept[0]}
    record = build_task(
        kept,
        metrics,
        version=TASK_VERSION,
        num_fewshot=0,
        fingerprint=items_fingerprint(
            {"id": str(row["id"]), "prompt": ids["input_ids"], "reference": row.get("answer")}
            for row, ids in zip(rows, tokenized, strict=True)
        ),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    return record | {"data_sha256": data_sha256(rows)}


def chat_template_hash(tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template, or None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None
