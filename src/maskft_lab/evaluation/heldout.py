"""Held-out items: negative log-likelihood of each, and exact-match accuracy where an answer can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from maskft.data.answers import check_answer
from maskft.data.arguments import DataArguments, check_sizes
from maskft.data.mixtures import load_examples
from maskft.data.sources import FILE_ENDINGS
from maskft.data.splits import load_splits
from maskft.data.tokenizing import prompt_ids, prompt_of, tokenize_example
from maskft.loss import RowLoss, length_sorted_batches, nll_per_item, pad
from maskft_common.errors import UserError
from maskft_common.files import digest

from ..generation.greedy import Bounds, check_context, memory_bound_rows
from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .evaluation_arguments import EvaluationArguments
from .journal import Journal, generated, resumed
from .load_models import Loaded

TASK_VERSION = 1
MAX_QUESTION = 500  # characters
MAX_LOSS_BATCH_SIZE = 16  # a larger one is no faster, and the loss needs logits of all tokens of a row
_LOSS = "heldout_loss"  # in the journal


def heldout_rows(data: DataArguments, eval_split_size: float | None, tokenizer, text_field: str = "text") -> list[dict]:
    """The rows to evaluate: held-out data where some is named or held out of ``dataset_name``, else all of that.

    Args:
        data: What to read.
        eval_split_size: Size of the part that training holds out of ``dataset_name``, see `DataArguments`; None: there
            is no such part.
        tokenizer: Of the model; None: rows as for one with a chat template.
        text_field: Column of plain text data.
    """
    check_sizes(data)
    name = data.dataset_name or ""
    is_split = eval_split_size is not None or data.eval_dataset_name or data.dataset_eval_split
    if is_split or not name:
        if eval_split_size is not None:
            data = replace(data, eval_split_size=eval_split_size)
        return list(load_splits(data, data.split_seed, tokenizer, text_field).heldout)
    rows = load_examples(
        name,
        data.dataset_train_split,
        config=data.dataset_config,
        as_chat=data.as_chat,
        tokenizer=tokenizer,
        text_field=text_field,
        data_dir=data.data_dir,
    )
    return list(rows.select(range(min(len(rows), data.max_eval_samples or len(rows)))))


def name_of_test_set(data: DataArguments, eval_split_size: float | None) -> str | None:
    """Name of the file that is the test set; None where the rows are a part of one, of several, or no file."""
    name = data.eval_dataset_name or ("" if eval_split_size is not None else data.dataset_name or "")
    is_file = name.lower().endswith(FILE_ENDINGS) and (Path(name).is_file() or data.data_dir is not None)
    return Path(name).name if is_file and not data.dataset_eval_split else None


def evaluate_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    options: EvaluationArguments = EvaluationArguments(),  # noqa: B008 - not changed
    journal: Journal | None = None,
) -> dict:
    """Held-out loss and, where every row has an ``answer``, accuracy of greedily generated answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        options: How they are evaluated.
        journal: Keeps losses and answers; None: nothing is kept.

    Returns:
        A task record of the result schema, metrics ``nll`` and possibly ``accuracy``.
    """
    rows = list(rows)
    if not rows:
        raise UserError("there are no items to evaluate; check eval_split_size and max_eval_samples")
    unanswered = 0 if options.no_generate else sum(row.get("answer") is None for row in rows)
    generate = not options.no_generate and not unanswered
    tokenized = [tokenize_example(row, tokenizer, max_length=options.max_length) for row in rows]
    check_context(model, max(len(row["input_ids"]) for row in tokenized))
    prompts = [prompt_ids(row, tokenizer) for row in rows] if generate else []
    if generate:
        check_context(model, max(map(len, prompts)), options.max_new_tokens)
    items = []
    for row, (nll, count) in zip(rows, _losses(model, tokenizer, tokenized, options.batch_size, journal), strict=True):
        items.append({"id": str(row["id"]), "nll": nll if math.isfinite(nll) else None, "num_tokens": count})
        if row.get("cluster_id") is not None:
            items[-1]["cluster_id"] = row["cluster_id"]
    if generate:
        bounds = Bounds(options.max_new_tokens, options.batch_size)
        outputs = generated(model, tokenizer, prompts, bounds, "answers", journal)
        for item, row, output in zip(items, rows, outputs, strict=True):
            correct = check_answer(output, row["answer"], row.get("answer_type") or "exact")
            item.update(accuracy=int(correct), prompt=_question(row), answer=row["answer"], output=output)
    kept = [item for item in items if item["num_tokens"] > 0]
    without = f"{len(items) - len(kept)} of {len(items)} items have no supervised token within --max_length"
    if not kept:
        raise UserError(f"{without} {options.max_length}; raise it")
    metrics = {name: metric_from_items(kept, name) for name in ("nll", "accuracy") if name in kept[0]}
    asked = zip(rows, (ids["input_ids"] for ids in tokenized), strict=True)
    record = task_record(kept, metrics, asked, tokenizer, TASK_VERSION) | {"data_sha256": data_sha256(rows)}
    if generate:
        record["generation_kwargs"] = {"max_gen_toks": options.max_new_tokens}
    notes = [f"{without} and count in no metric"] if len(kept) < len(items) else []
    if 0 < unanswered < len(rows):
        notes.append(f"no accuracy: {unanswered} of {len(rows)} rows have no answer")
    return record | ({"note": "; ".join(notes)} if notes else {})


def task_record(items: list[dict], metrics: dict, asked: Iterable[tuple[dict, Any]], tokenizer, version: int) -> dict:
    """A task record of items that were ``asked``: each row with its prompt."""
    fingerprint = items_fingerprint(
        {"id": str(row["id"]), "prompt": prompt, "reference": row.get("answer")} for row, prompt in asked
    )
    template = chat_template_hash(tokenizer)
    how = {"version": version, "num_fewshot": 0, "fingerprint": fingerprint, "chat_template_hash": template}
    return dict(build_task(items, metrics, **how))


def evaluate_kl(loaded: Loaded, rows: Sequence[dict], options: EvaluationArguments, journal: Journal) -> dict:
    """KL(before || model) of the next token, the mean over the tokens of each row's prompt, in nats.

    Args:
        loaded: The model, with its weights before training.
        rows: Rows as ``load_splits`` makes them.
        options: How they are evaluated; prompts are truncated to ``max_length`` tokens.
        journal: Keeps the values.

    Returns:
        A task record of the result schema, metric ``kl``.
    """
    model = loaded.model
    tokenizer = loaded.tokenizer
    prompts = [prompt_ids(row, tokenizer)[: options.max_length] for row in rows]
    check_context(model, max(map(len, prompts)))

    def compute(missing: list[int], keep: Callable) -> None:
        lengths = [len(prompts[index]) for index in missing]
        for places in length_sorted_batches(lengths, _rows_at_once(model, lengths, options.batch_size)):
            ids_BT, mask_BT = pad([prompts[missing[p]] for p in places], tokenizer.pad_token_id or 0, model.device)
            of_before = _log_probs(model, loaded.before or {}, ids_BT, mask_BT)
            kl_BT = (of_before.exp() * (of_before - _log_probs(model, {}, ids_BT, mask_BT))).sum(-1) * mask_BT
            for place, value in zip(places, (kl_BT.sum(1) / mask_BT.sum(1)).tolist(), strict=True):
                keep(place, value)

    values = resumed("kl", [[ids] for ids in prompts], compute, "KL", journal)
    finite = [value if math.isfinite(value) else None for value in values]
    items = [{"id": str(row["id"]), "kl": value} for row, value in zip(rows, finite, strict=True)]
    metrics = {"kl": metric_from_items(items, "kl", unit="nats", higher_is_better=False)}
    record = task_record(items, metrics, zip(items, prompts, strict=True), tokenizer, TASK_VERSION)
    return record | {"data_sha256": data_sha256(rows)}


@torch.inference_mode()
def _log_probs(model, weights: Mapping[str, torch.Tensor], ids_BT, mask_BT) -> torch.Tensor:
    """Of each next token; ``weights`` stand in the place of the model's own of their names."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
    return functional_call(model, dict(weights), kwargs=inputs).logits.float().log_softmax(-1)


def _question(row: dict) -> str:
    """The prompt as a reader of the items wants it: its text, or the last message, and of long ones the beginning."""
    prompt = prompt_of(row)
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])[:MAX_QUESTION]


def _losses(model, tokenizer, rows: Sequence[dict], batch_size: int | None, journal: Journal | None) -> list[RowLoss]:
    """`nll_per_item` of tokenised rows, resumed."""

    def compute(indices: list[int], keep: Callable) -> None:
        chosen = [rows[index] for index in indices]
        size = _rows_at_once(model, [len(row["input_ids"]) for row in chosen], batch_size)
        nll_per_item(model, chosen, batch_size=size, pad_token_id=tokenizer.pad_token_id or 0, on_loss=keep)

    return resumed(_LOSS, [[row["input_ids"], row["labels"]] for row in rows], compute, "held-out loss", journal)


def _rows_at_once(model, lengths: Sequence[int], batch_size: int | None) -> int:
    return batch_size or min(memory_bound_rows(model, max(lengths)), MAX_LOSS_BATCH_SIZE)


def chat_template_hash(tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template, or None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(str(template)) if template else None
