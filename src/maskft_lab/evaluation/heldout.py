"""Held-out items: negative log-likelihood of each, and exact-match accuracy where an answer can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from maskft.data import load_examples, load_splits, prompt_ids, prompt_of, tokenize_example
from maskft.data.answers import check_answer
from maskft.data.arguments import DataArguments
from maskft.data.sources import FILE_ENDINGS
from maskft.loss import RowLoss, length_sorted_batches, nll_per_item, pad
from maskft_base.errors import UserError
from maskft_base.files import digest

from ..generation.greedy import check_context, context_length, memory_bound_rows
from ..results.schema import build_task, data_sha256, items_fingerprint, metric_from_items
from .arguments import EvaluationArguments
from .journal import Resources, generated, resumed

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
    resources: Resources = Resources(),  # noqa: B008 - frozen
) -> dict:
    """Held-out loss and, where every row has an ``answer``, accuracy of greedily generated answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        options: How they are evaluated.
        resources: Bounds on a batch, journal and console.

    Returns:
        A task record of the result schema, metrics ``nll`` and possibly ``accuracy``.
    """
    rows = list(rows)
    if not rows:
        raise UserError("there are no items to evaluate; check eval_split_size and max_eval_samples")
    generate = not options.no_generate and all(row.get("answer") is not None for row in rows)
    how = {"max_length": options.max_length, "text_field": options.dataset_text_field}
    tokenized = [tokenize_example(row, tokenizer, **how) for row in rows]
    notes = [_beyond_context(model, tokenized)]
    prompts = [prompt_ids(row, tokenizer) for row in rows] if generate else []
    if generate:
        check_context(model, max(map(len, prompts)), options.max_new_tokens)
    items = []
    for row, (nll, count) in zip(rows, _losses(model, tokenizer, tokenized, resources), strict=True):
        items.append({"id": str(row["id"]), "nll": nll if math.isfinite(nll) else None, "num_tokens": count})
        if row.get("cluster_id") is not None:
            items[-1]["cluster_id"] = row["cluster_id"]
    if generate:
        outputs = generated(model, tokenizer, prompts, options.max_new_tokens, "answers", resources)
        for item, row, output in zip(items, rows, outputs, strict=True):
            correct = check_answer(output, row["answer"], row.get("answer_type") or "exact")
            item.update(accuracy=int(correct), prompt=_question(row), answer=row["answer"], output=output)
    kept = [item for item in items if item["num_tokens"] > 0]
    where = f"no supervised token within max_length={options.max_length}"
    if not kept:
        raise UserError(f"no item has a supervised token within max_length={options.max_length}; raise it")
    if len(kept) < len(items):
        notes.append(f"{len(items) - len(kept)} of {len(items)} items have {where} and count in no metric")
    metrics = {name: metric_from_items(kept, name) for name in ("nll", "accuracy") if name in kept[0]}
    asked = zip(rows, (ids["input_ids"] for ids in tokenized), strict=True)
    record = _record(kept, metrics, asked, tokenizer) | {"data_sha256": data_sha256(rows)}
    if generate:
        record["generation_kwargs"] = {"max_gen_toks": options.max_new_tokens}
    return record | ({"note": ". ".join(filter(None, notes))} if any(notes) else {})


def _record(items: list[dict], metrics: dict, asked: Iterable[tuple[dict, list[int]]], tokenizer) -> dict:
    """A task record of items that were ``asked`` (rows and tokens)."""
    return dict(
        build_task(
            items,
            metrics,
            version=TASK_VERSION,
            num_fewshot=0,
            fingerprint=items_fingerprint(
                {"id": str(row["id"]), "prompt": ids, "reference": row.get("answer")} for row, ids in asked
            ),
            chat_template_hash=chat_template_hash(tokenizer),
        )
    )


def evaluate_kl(
    model, before: Mapping[str, torch.Tensor], tokenizer, rows: Sequence[dict], max_length: int | None = None
) -> dict:
    """KL(before || model) of the next token, the mean over the tokens of each row's prompt, in nats.

    Args:
        model: A causal language model.
        before: Its weights before training, by name.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        max_length: Truncation of the prompt in tokens; None: not truncated.

    Returns:
        A task record of the result schema, metric ``kl``.
    """
    prompts = [prompt_ids(row, tokenizer)[:max_length] for row in rows]
    values = [0.0] * len(rows)
    for indices in length_sorted_batches([len(ids) for ids in prompts], MAX_LOSS_BATCH_SIZE):
        ids_BT, mask_BT = pad([prompts[i] for i in indices], tokenizer.pad_token_id or 0, model.device)
        of_before = _log_probs(model, before, ids_BT, mask_BT)
        kl_BT = (of_before.exp() * (of_before - _log_probs(model, {}, ids_BT, mask_BT))).sum(-1) * mask_BT
        for index, value in zip(indices, kl_BT.sum(1) / mask_BT.sum(1), strict=True):
            values[index] = float(value)
    items = [{"id": str(row["id"]), "kl": value} for row, value in zip(rows, values, strict=True)]
    metrics = {"kl": metric_from_items(items, "kl", unit="nats", higher_is_better=False)}
    return _record(items, metrics, zip(items, prompts, strict=True), tokenizer) | {"data_sha256": data_sha256(rows)}


@torch.inference_mode()
def _log_probs(model, weights: Mapping[str, torch.Tensor], ids_BT, mask_BT) -> torch.Tensor:
    """Of each next token; ``weights`` stand in the place of the model's own of their names."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
    return functional_call(model, dict(weights), kwargs=inputs).logits.float().log_softmax(-1)


def _question(row: dict) -> str:
    """The prompt as a reader of the items wants it: its text, or the last message, and of long ones the beginning."""
    prompt = prompt_of(row)
    return str(prompt if isinstance(prompt, str) else prompt[-1]["content"])[:MAX_QUESTION]


def _losses(model, tokenizer, rows: Sequence[dict], resources: Resources) -> list[RowLoss]:
    """`nll_per_item` of tokenised rows, resumed."""

    def compute(indices: list[int], keep: Callable) -> None:
        chosen = [rows[index] for index in indices]
        longest = max(len(row["input_ids"]) for row in chosen)
        # Logits in float32 and in float64, beside those in the model's dtype.
        logits = 3 * 4 * model.config.get_text_config().vocab_size * longest
        bound = memory_bound_rows(model, longest, 0, resources.max_memory_bytes, extra_row_bytes=logits)
        size = resources.batch_size or min(bound, MAX_LOSS_BATCH_SIZE)
        nll_per_item(model, chosen, batch_size=size, pad_token_id=tokenizer.pad_token_id or 0, on_loss=keep)

    return resumed(_LOSS, [[row["input_ids"], row["labels"]] for row in rows], compute, "held-out loss", resources)


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


def has_learned_positions(model, context: int) -> bool:
    """Whether the positions of a context are rows of a table, as in GPT-2 and OPT: beyond its end there is no loss."""
    return any(
        isinstance(module, nn.Embedding) and module.num_embeddings >= context and ("wpe" in name or "position" in name)
        for name, module in model.named_modules()
    )


def chat_template_hash(tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template, or None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return digest(str(template)) if template else None
