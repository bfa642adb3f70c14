"""Held-out items: negative log-likelihood of each, and exact-match accuracy where an answer can be checked.

Shapes: B rows, T tokens, V vocabulary.
"""

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
from maskft.data.mixtures import load_examples, parse_mixture
from maskft.data.splits import check_hub_options, clusters_of, load_heldout, load_splits
from maskft.data.tokenizing import completion_of, end_of_turn, prompt_ids, prompt_of, tokenize_example
from maskft.loss import RowLoss, length_sorted_batches, nll_per_item, pad
from maskft_common.errors import UserError
from maskft_common.files import digest, is_there
from maskft_common.layout import DATA_FILE_ENDINGS

from ..generation.greedy import Bounds, check_context, check_not_empty, memory_bound_rows
from ..results.schema import build_task, cluster_ids, data_sha256, items_fingerprint, metric_from_items
from .evaluation_arguments import EvaluationArguments
from .journal import Journal, generated, resumed
from .load_models import Loaded

TASK_VERSION = 1
# Characters of a prompt in a result file.
MAX_QUESTION = 500
# Characters of a text in a message.
MAX_SHOWN = 60
# Larger batches are not faster, and the loss needs logits of all tokens of a row.
MAX_LOSS_BATCH_SIZE = 16
# Five float32 tensors: log-probabilities before and after, the probabilities, the difference and the product.
KL_BYTES_PER_LOGIT = 5 * 4
# Kinds of requests in the journal.
_LOSS = "heldout_loss"
_KL = "kl"


def heldout_rows(
    data: DataArguments,
    eval_split_size: float | None,
    tokenizer,
    text_field: str = "text",
) -> list[dict]:
    """The rows to evaluate: the named held-out data, or the part held out of ``dataset_name``, or all of that.

    Args:
        data: The data options.
        eval_split_size: Size of the part that training holds out of ``dataset_name``, see `DataArguments`; None: it
            holds out none.
        tokenizer: Of the model; None: rows as for one with a chat template.
        text_field: Column of plain text data.
    """
    check_sizes(data)
    name = data.dataset_name or ""
    if data.eval_dataset_name and not name:
        return list(load_heldout(data, data.split_seed, tokenizer, text_field))

    # As training reads them. Without any name load_splits() raises.
    is_split = eval_split_size is not None or data.eval_dataset_name or data.dataset_eval_split
    if is_split or not name:
        if eval_split_size is not None:
            data = replace(data, eval_split_size=eval_split_size)
        splits = load_splits(data, data.split_seed, tokenizer, text_field)
        return list(splits.heldout)

    check_hub_options(data)
    # All rows of dataset_name: a file of test rows is given to an evaluation as its only data.
    rows = load_examples(
        name,
        data.dataset_train_split,
        config=data.dataset_config,
        as_chat=data.as_chat,
        tokenizer=tokenizer,
        text_field=text_field,
        data_dir=data.data_dir,
        seed=data.split_seed,
    )
    num_rows = len(rows)
    if data.max_eval_samples:
        num_rows = min(num_rows, data.max_eval_samples)
    return list(rows.select(range(num_rows)))


def name_of_test_set(data: DataArguments, eval_split_size: float | None) -> str | None:
    """Name of the file that is the test set; None if the rows are a part of a file, of several files, or of none."""
    name = data.eval_dataset_name
    if not name and eval_split_size is None:
        name = data.dataset_name
    if not name or data.dataset_eval_split:
        return None
    first, *others = parse_mixture(name)
    if others or first.amount is not None:
        return None
    if not name.lower().endswith(DATA_FILE_ENDINGS):
        return None
    # A file in data_dir is named relative to it.
    if data.data_dir is None and not is_there(name):
        return None
    return Path(name).name


def evaluate_rows(
    model,
    tokenizer,
    rows: Sequence[dict],
    options: EvaluationArguments | None = None,
    journal: Journal | None = None,
) -> dict:
    """Held-out loss and, where every row has an ``answer``, accuracy of greedily generated answers.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        rows: Rows as ``load_splits`` makes them.
        options: How they are evaluated; None: the defaults of ``maskft evaluate``.
        journal: Keeps losses and answers; None: nothing is kept.

    Returns:
        A task record of the result schema, metrics ``nll`` and possibly ``accuracy``.
    """
    if options is None:
        options = EvaluationArguments()
    # They are read several times, and a data set decodes a row at each access.
    rows = list(rows)
    _check_rows(rows)

    # Accuracy is over all rows or not given: over some of them it would be another task.
    num_unanswered = 0
    if not options.no_generate:
        num_unanswered = sum(row.get("answer") is None for row in rows)
    has_answers = not options.no_generate and num_unanswered == 0
    num_wrong = num_wrong_completions(rows) if has_answers else 0

    # Both checks come before the first forward pass: a loss over all rows may take an hour.
    tokenized = [tokenize_example(row, tokenizer, max_length=options.max_length) for row in rows]
    longest = max(len(row["input_ids"]) for row in tokenized)
    check_context(model, longest)
    prompts: list[list[int]] = []
    if has_answers:
        prompts = [prompt_ids(row, tokenizer) for row in rows]
        check_not_empty(prompts)
        longest = max(map(len, prompts))
        check_context(model, longest, options.max_new_tokens)

    # The loss
    items: list[dict[str, Any]] = []
    # In the order of the rows, however they were batched.
    losses = _losses(model, tokenizer, tokenized, options.batch_size, journal)
    clusters = clusters_of(rows)
    for row, cluster, (nll, num_tokens) in zip(rows, clusters, losses, strict=True):
        item = {
            "id": str(row["id"]),
            "nll": nll if math.isfinite(nll) else None,
            "num_tokens": num_tokens,
        }
        # Only where the rows have it: the schema wants it for all items or for none.
        if cluster is not None:
            item["cluster_id"] = cluster
        items.append(item)

    # Accuracy
    if has_answers:
        bounds = Bounds(
            options.max_new_tokens,
            options.batch_size,
            end_tokens=end_tokens(rows[0], tokenizer),
        )
        outputs = generated(model, tokenizer, prompts, bounds, "answers", journal)
        for item, row, output in zip(items, rows, outputs, strict=True):
            is_correct = check_answer(output, row["answer"], row.get("answer_type") or "exact")
            item["accuracy"] = int(is_correct)
            item["prompt"] = _question(row)
            item["answer"] = row["answer"]
            item["output"] = output

    # A prompt may fill max_length, and nothing of its completion is left. Or there is none.
    kept = [item for item in items if item["num_tokens"] > 0]
    num_without = len(items) - len(kept)
    without = f"{num_without} of {len(items)} items have no supervised token"
    remedy = "give rows with a completion, or an assistant turn after the first message"
    if options.max_length is not None:
        without += f" within --max_length {options.max_length}"
        remedy = "raise it"
    if not kept:
        raise UserError(f"{without}; {remedy}")

    # The record
    # The loss first, as the main metric of rows without answers.
    metrics = {"nll": metric_from_items(kept, "nll")}
    if has_answers:
        metrics["accuracy"] = metric_from_items(kept, "accuracy")
    # Token ids, so that results of two tokenizers have different fingerprints: their losses per token cannot be
    # compared.
    input_ids = [row["input_ids"] for row in tokenized]
    asked = zip(rows, input_ids, strict=True)
    record = task_record(kept, metrics, asked, tokenizer, TASK_VERSION)
    record["data_sha256"] = data_sha256(rows)
    if has_answers:
        record["generation_kwargs"] = {"max_gen_toks": options.max_new_tokens}

    notes: list[str] = []
    if num_without:
        notes.append(f"{without} and count in no metric")
    if num_wrong:
        notes.append(f"{num_wrong} of {len(rows)} completions of the rows do not count as their answer")
    if 0 < num_unanswered < len(rows):
        notes.append(f"no accuracy: {num_unanswered} of {len(rows)} rows have no answer that can be checked")
    if notes:
        record["note"] = "; ".join(notes)
    return record


def end_tokens(row: dict, tokenizer) -> list[int]:
    """Tokens that end an answer, beside the tokenizer's and the model's own."""
    prompt = prompt_of(row)
    if isinstance(prompt, str):
        return []
    token_id = end_of_turn(prompt, tokenizer)
    return [] if token_id is None else [token_id]


def _check_rows(rows: Sequence[dict]) -> None:
    """Raise for rows that no result can hold, before hours are spent on them."""
    if not rows:
        raise UserError("there are no items to evaluate; check eval_split_size and max_eval_samples")

    # An id is the hash of a row. Within a file equal rows are numbered, so these are of two sets of a mixture.
    seen: set[str] = set()
    for row in rows:
        identity = str(row["id"])
        if identity in seen:
            raise UserError(f"two rows have the id {identity!r}, the same row in two sets; leave it out of one of them")
        seen.add(identity)

    # Raises where only some rows have a cluster, as in a mixture with sets that have none.
    cluster_ids(rows)


def num_wrong_completions(rows: Sequence[dict]) -> int:
    """The number of rows whose own completion would count as a wrong answer; rows without an answer do not count.

    Raises:
        UserError: If it is all of them: a model that learns these completions would be right for none.
    """
    wrong = []
    asked = [row for row in rows if row.get("answer") is not None]
    for row in asked:
        completion = completion_of(row)
        if not check_answer(completion, row["answer"], row.get("answer_type") or "exact"):
            wrong.append((completion, row["answer"]))
    if wrong and len(wrong) == len(asked):
        completion, answer = wrong[0]
        raise UserError(
            f"no completion counts as its row's answer (the first: answer {answer[:MAX_SHOWN]!r}, completion "
            f"{completion[:MAX_SHOWN]!r}), so a model that learns them has 0 %: an answer that is no number has to be "
            "all of the completion; mend the column 'answer', or measure the loss alone with --no_generate"
        )
    return len(wrong)


def task_record(
    items: list[dict],
    metrics: dict,
    asked: Iterable[tuple[dict, Any]],
    tokenizer,
    version: int,
) -> dict:
    """A task record.

    Args:
        items: The items.
        metrics: Their metrics.
        asked: Each row with its prompt.
        tokenizer: Of the model.
        version: Of the task.
    """
    questions: list[dict[str, Any]] = []
    for row, prompt in asked:
        questions.append(
            {
                "id": str(row["id"]),
                "prompt": prompt,
                "reference": row.get("answer"),
            }
        )
    record = build_task(
        items,
        metrics,
        version=version,
        num_fewshot=0,
        fingerprint=items_fingerprint(questions),
        chat_template_hash=chat_template_hash(tokenizer),
    )
    return dict(record)


def evaluate_kl(
    loaded: Loaded,
    rows: Sequence[dict],
    options: EvaluationArguments,
    journal: Journal,
) -> dict:
    """KL(before || model) of the next token, the mean over the tokens of each row's prompt, in nats.

    Args:
        loaded: The model, with its weights before training.
        rows: Rows as ``load_splits`` makes them.
        options: How they are evaluated; prompts are truncated to ``max_length`` tokens.
        journal: Keeps the values.

    Returns:
        A task record of the result schema, metric ``kl``.
    """
    _check_rows(rows)
    model = loaded.model
    tokenizer = loaded.tokenizer
    prompts = [prompt_ids(row, tokenizer)[: options.max_length] for row in rows]
    # A mean over no tokens is not a number, and the metric would have no value.
    check_not_empty(prompts)
    longest = max(map(len, prompts))
    check_context(model, longest)

    def compute(missing: list[int], keep: Callable) -> None:
        lengths = [len(prompts[index]) for index in missing]
        batch_size = options.batch_size or _rows_at_once(model, lengths, KL_BYTES_PER_LOGIT)
        for places in length_sorted_batches(lengths, batch_size):
            batch = [prompts[missing[place]] for place in places]
            ids_BT, mask_BT = pad(batch, tokenizer.pad_token_id or 0, model.device)
            # One model computes both: a second one would take as much memory again.
            before_BTV = _log_probs(model, loaded.before or {}, ids_BT, mask_BT)
            after_BTV = _log_probs(model, {}, ids_BT, mask_BT)
            # Exact, as the sum over the vocabulary, and not an estimate from sampled tokens.
            kl_BT = (before_BTV.exp() * (before_BTV - after_BTV)).sum(-1)
            # The mean over the tokens of each prompt, without padding.
            kl_BT = kl_BT * mask_BT
            kl_B = kl_BT.sum(1) / mask_BT.sum(1)
            for place, value in zip(places, kl_B.tolist(), strict=True):
                keep(place, value)

    requests = [[ids] for ids in prompts]
    values = resumed(_KL, requests, compute, "KL", journal)
    items: list[dict[str, Any]] = []
    clusters = clusters_of(rows)
    for row, cluster, value in zip(rows, clusters, values, strict=True):
        item = {
            "id": str(row["id"]),
            "kl": value if math.isfinite(value) else None,
        }
        # Rows of one cluster depend on each other in this metric, too.
        if cluster is not None:
            item["cluster_id"] = cluster
        items.append(item)

    # Not a unit per token: every prompt counts alike, however long it is.
    metrics = {"kl": metric_from_items(items, "kl", unit="nats", higher_is_better=False)}
    asked = zip(items, prompts, strict=True)
    record = task_record(items, metrics, asked, tokenizer, TASK_VERSION)
    record["data_sha256"] = data_sha256(rows)
    return record


@torch.inference_mode()
def _log_probs(
    model,
    weights: Mapping[str, torch.Tensor],
    ids_BT,
    mask_BT,
) -> torch.Tensor:
    """Log-probabilities of each next token, (B, T, V), float32; ``weights`` replace the model's of the same names."""
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "use_cache": False,
    }
    # The weights are passed to this call only: the model keeps its own.
    logits_BTV = functional_call(model, dict(weights), kwargs=inputs).logits
    return logits_BTV.float().log_softmax(-1)


def _question(row: dict) -> str:
    """The prompt for a reader of the items: its text, or the last message; the beginning of a long one."""
    prompt = prompt_of(row)
    if isinstance(prompt, str):
        return prompt[:MAX_QUESTION]
    text = str(prompt[-1]["content"])
    return text[:MAX_QUESTION]


def _losses(
    model,
    tokenizer,
    rows: Sequence[dict],
    batch_size: int | None,
    journal: Journal | None,
) -> list[RowLoss]:
    """`nll_per_item` of tokenised rows, resumed."""

    def compute(indices: list[int], keep: Callable) -> None:
        missing = [rows[index] for index in indices]
        lengths = [len(row["input_ids"]) for row in missing]
        nll_per_item(
            model,
            missing,
            # Their float32 and float64 copies are of one row at a time.
            batch_size=batch_size or _rows_at_once(model, lengths, model.dtype.itemsize),
            # Without a padding token any token: padded positions have no loss, and no other token sees them.
            pad_token_id=tokenizer.pad_token_id or 0,
            on_loss=keep,
        )

    requests = [[row["input_ids"], row["labels"]] for row in rows]
    return resumed(_LOSS, requests, compute, "held-out loss", journal)


def _rows_at_once(
    model,
    lengths: Sequence[int],
    bytes_per_logit: int,
) -> int:
    """A batch size that fits into memory.

    Where bfloat16 is involved, rows in batches of another size have another loss, by some 1e-4 nats. Counting no more
    memory than is needed leaves `MAX_LOSS_BATCH_SIZE` almost everywhere, and so the same number.
    """
    # The first batch is that of the longest rows, so a size that fits it fits all.
    longest = max(lengths)
    num_rows = memory_bound_rows(model, longest, bytes_per_logit=bytes_per_logit)
    return min(num_rows, MAX_LOSS_BATCH_SIZE)


def chat_template_hash(tokenizer) -> str | None:
    """sha256 of the tokenizer's chat template, or None without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    # A text, or several templates by name.
    return digest(str(template))
