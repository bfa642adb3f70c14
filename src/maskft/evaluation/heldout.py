"""Evaluate a model on held-out items: loss per item, and exact-match accuracy where an answer can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..data import prompt_ids, tokenize_example
from ..data.answers import check_answer
from ..errors import UserError
from ..files import digest
from ..generation.greedy import check_context, context_length, greedy_generate, memory_bound_rows
from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from ..runtime import progress_bar
from .journal import Journal
from .loss import has_learned_positions, nll_per_item

TASK_VERSION = 1
MAX_LOSS_BATCH_SIZE = 16  # a larger one is no faster, and the loss needs logits of all tokens of a row
_LOSS, _ANSWER = "heldout_loss", "heldout_answer"  # in the journal


def evaluate_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    *,
    batch_size: int | None = None,
    max_memory_gb: float | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    generate: bool | None = None,
    text_field: str = "text",
    journal: Journal | None = None,
    console=None,
) -> dict:
    """Held-out loss and, for rows with an ``answer``, accuracy of greedily generated answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        batch_size: Rows at one time; None: by ``max_memory_gb``.
        max_memory_gb: Bound on the memory of a batch, in 10^9 bytes; None: half of what is free.
        max_length: Truncation of the scored sequence in tokens; None: not truncated.
        max_new_tokens: Bound on a generated answer, in tokens.
        generate: Whether to generate answers; None: where every row has one to check.
        text_field: Column of plain text data.
        journal: Keeps losses and answers, so that a run that ends early goes on.
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
    notes = [_beyond_context(model, tokenized)]
    if generate:
        check_context(model, max(map(len, prompts)), max_new_tokens)
    max_memory_bytes = None if max_memory_gb is None else max_memory_gb * 1e9

    def losses(indices: list[int], keep: Callable) -> None:
        chosen = [tokenized[index] for index in indices]
        size = batch_size or _loss_batch_size(model, max(len(row["input_ids"]) for row in chosen), max_memory_bytes)
        nll_per_item(model, chosen, batch_size=size, pad_token_id=tokenizer.pad_token_id or 0, on_loss=keep)

    requests = [[row["input_ids"], row["labels"]] for row in tokenized]
    items = [
        {"id": str(row["id"]), "nll": nll if math.isfinite(nll) else None, "num_tokens": count}
        for row, (nll, count) in zip(
            rows, resumed(_LOSS, requests, losses, journal, "held-out loss", console), strict=True
        )
    ]
    if generate:
        outputs = resumed_answers(
            model,
            tokenizer,
            prompts,
            journal,
            _ANSWER,
            "answers",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_memory_gb=max_memory_gb,
            console=console,
        )
        for item, row, output in zip(items, rows, outputs, strict=True):
            correct = check_answer(output, row["answer"], row.get("answer_type") or "exact")
            item.update(accuracy=int(correct), answer=row["answer"], output=output)
    kept = [item for item in items if item["num_tokens"] > 0]
    if not kept:
        raise UserError(f"no item has a supervised token within max_length={max_length}; raise it")
    if len(kept) < len(items):
        notes.append(
            f"{len(items) - len(kept)} of {len(items)} items have no supervised token within max_length={max_length} "
            "and count in no metric"
        )
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
    return (
        record
        | {"data_sha256": data_sha256(rows)}
        | ({"generation_kwargs": {"max_gen_toks": max_new_tokens}} if generate else {})
        | ({"note": ". ".join(filter(None, notes))} if any(notes) else {})
    )


def _beyond_context(model, rows: Sequence[dict]) -> str | None:
    """A note on rows that are longer than the model's context; those of a model that cannot read them are refused."""
    context, longest = context_length(model), max(len(row["input_ids"]) for row in rows)
    if not 0 < context < longest:
        return None
    if has_learned_positions(model, context):
        raise UserError(
            f"the longest item has {longest} tokens, and the model has positions for {context}; pass --max_length "
            f"{context}, or leave out items that long"
        )
    count = sum(len(row["input_ids"]) > context for row in rows)
    return f"{count} of {len(rows)} items are longer than the model's context of {context} tokens"


def resumed(
    kind: str,
    requests: Sequence[list],
    compute: Callable[[list[int], Callable[[int, Any], None]], None],
    journal: Journal | None,
    title: str,
    console=None,
) -> list:
    """Answers to requests: those that the journal knows, and the others computed and kept one by one.

    Args:
        kind: What is asked, for the journal.
        requests: What each answer depends on, JSON-able.
        compute: Given the indices of the requests to compute, it calls its second argument with the position among
            these and the answer, for each.
        journal: None: nothing is kept.
        title: Of the progress bar.
        console: Where the progress bar goes.
    """
    answers: dict[int, Any] = {}
    if journal:
        keys = [journal.key(kind, request) for request in requests]
        answers = {index: journal.answers[key] for index, key in enumerate(keys) if key in journal.answers}
    missing = [index for index in range(len(requests)) if index not in answers]
    with progress_bar(console) as progress:
        bar = progress.add_task(title, total=len(requests), completed=len(answers))

        def keep(position: int, answer: Any) -> None:
            answers[missing[position]] = answer
            if journal:
                journal.add_partial(kind, requests[missing[position]], answer)
            progress.advance(bar)

        if missing:
            compute(missing, keep)
    return [answers[index] for index in range(len(requests))]


def resumed_answers(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    journal: Journal | None,
    kind: str,
    title: str,
    *,
    max_new_tokens: int,
    batch_size: int | None,
    max_memory_gb: float | None,
    console=None,
) -> list[str]:
    """Generated answers to prompts of token ids, see `resumed` and `generation.greedy_generate`."""

    def generate(indices: list[int], keep: Callable[[int, str], None]) -> None:
        greedy_generate(
            model,
            tokenizer,
            [prompts[index] for index in indices],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_memory_bytes=None if max_memory_gb is None else max_memory_gb * 1e9,
            on_answer=keep,
        )

    return resumed(kind, [[ids, max_new_tokens] for ids in prompts], generate, journal, title, console)


def _loss_batch_size(model, longest: int, max_memory_bytes: float | None) -> int:
    # In float32 and in float64, beside those in the model's dtype.
    logits = 3 * 4 * model.config.get_text_config().vocab_size * longest
    rows = memory_bound_rows(model, longest, 0, max_memory_bytes, extra_row_bytes=logits)
    return min(rows, MAX_LOSS_BATCH_SIZE)


def chat_template_hash(tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template, or None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(str(template)) if template else None
