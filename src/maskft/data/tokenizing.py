"""Tokens and labels: the one tokenisation for training and for evaluation."""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from datasets import Dataset

from maskft_common.errors import UserError, first_line
from maskft_common.time_limit import time_limit

logger = logging.getLogger(__name__)

# Rendering a conversation takes milliseconds. A template is a program, and nested loops need not end.
_TEMPLATE_SECONDS = 10.0

# The day that chat templates write, the default of Llama 3.2's. With the day of the run the tokens would be others than
# yesterday's, and no cache, checkpoint or result would fit.
_TEMPLATE_DAY = datetime(2024, 7, 26)
# How a template asks for the day in a format of its own, as SmolLM3's does: strftime_now("%d %B %Y").
_ASKS_FOR_DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Label of a token without loss, as in torch's cross_entropy.
IGNORED = -100

Row = Mapping[str, Any]
Message = dict[str, str]


def tokenize_example(
    example: Row,
    tokenizer,
    max_length: int | None = None,
    completion_only_loss: bool = True,
) -> dict[str, list[int]]:
    """Turn an example into token ids and labels; the one tokenisation for training and for evaluation.

    The loss is taken on the completion, or on every assistant turn of ``messages`` (the text that the chat template
    writes after the turn's header, with the end-of-turn token), or on all of a text. Plain text ends with the
    end-of-sequence token.
    As in TRL, a completion starts where the tokens of the prompt alone and of the whole diverge: a token that spans the
    border is trained on. Spaces at the end of a plain prompt belong to the completion: most tokenizers join a space to
    the word after it. The first token has no label, nor has an assistant turn that opens a conversation.

    Args:
        example: A row of ``load_examples``.
        tokenizer: A transformers tokenizer.
        max_length: Number of tokens to keep, from the start. None keeps all.
        completion_only_loss: False takes the loss on every token.

    Returns:
        ``input_ids`` and ``labels``, equally long; a label is the token's id, or -100 for no loss.

    Raises:
        UserError: If the tokenizer lacks an eos_token or chat template that the example needs, or the template fails.
    """
    text, spans, templated = _render_spans(example, tokenizer)
    input_ids = _encode(tokenizer, text, templated)
    # Plain text: without this token the model would not learn to stop. Chat templates write their own end of turn.
    if not templated:
        eos_token_id = tokenizer.eos_token_id
        if eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, so the model cannot learn to stop; set one")
        # Some tokenizers add it themselves.
        if input_ids[-1:] != [eos_token_id]:
            input_ids.append(eos_token_id)

    # One span over everything takes the place of the answers'.
    labels = [IGNORED] * len(input_ids)
    if not completion_only_loss:
        spans = [("", text)]
    for before, until in spans:
        # The borders of a part in tokens: where the tokens of the text up to there diverge from those of the whole. No
        # model predicts the first token.
        start = 1
        if before:
            ids_before = _encode(tokenizer, before, templated)
            start = max(1, _common_length(ids_before, input_ids))
        # A part that ends with the text includes the end-of-sequence token.
        end = len(input_ids)
        if until != text:
            ids_until = _encode(tokenizer, until, templated)
            end = _common_length(ids_until, input_ids)
        labels[start:end] = input_ids[start:end]

    return {
        "input_ids": input_ids[:max_length],
        "labels": labels[:max_length],
    }


def prompt_of(example: Row) -> str | list[dict]:
    """Return the prompt, all before the last assistant turn: a text, or messages.

    Raises:
        UserError: If the example is plain text, or a conversation that begins with its last assistant turn.
    """
    if "messages" in example:
        # The last assistant turn, or the end of a conversation that has none.
        messages = example["messages"]
        last_turn = len(messages)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                last_turn = index
        if last_turn == 0:
            raise UserError(
                f"the conversation that begins {_shortened(messages[0]['content'])!r} has no prompt to generate from: "
                "its last assistant turn comes first; leave it out"
            )
        return messages[:last_turn]
    if "prompt" in example:
        return example["prompt"]
    raise _no_prompt()


def _no_prompt() -> UserError:
    return UserError(
        "plain text has no prompt to generate an answer from; give data with prompts, or measure the loss alone with "
        "--no_generate"
    )


def completion_of(example: Row) -> str:
    """Return the text that a row itself answers its prompt with: the completion, or the last assistant turn."""
    if "completion" in example:
        completion = example["completion"]
    elif "messages" in example:
        completion = example["messages"]
    else:
        raise _no_prompt()
    if isinstance(completion, str):
        return completion
    turns = [message["content"] for message in completion if message["role"] == "assistant"]
    return str(turns[-1]) if turns else ""


def prompt_ids(example: Row, tokenizer) -> list[int]:
    """Return the token ids after which a model generates its answer: those before the (last) assistant turn."""
    prompt = prompt_of(example)
    if not isinstance(prompt, str):
        text = _render(prompt, tokenizer, generation=True)
        return _encode(tokenizer, text, templated=True)

    ids = _encode(tokenizer, _without_last_spaces(prompt), templated=False)
    # Some tokenizers end every text with the end-of-sequence token, after which a model would answer nothing.
    if ids[-1:] == [tokenizer.eos_token_id]:
        return ids[:-1]
    return ids


def end_of_turn(prompt: list[Message], tokenizer) -> int | None:
    """Return the token with which the chat template ends an assistant turn after ``prompt``, None without one.

    A base model may end its texts with another one: those of Qwen 2.5 and 3 end with ``<|endoftext|>``, and turns in
    their template with ``<|im_end|>``.
    """
    answer = "42"
    text = _render([*prompt, {"role": "assistant", "content": answer}], tokenizer)
    _, _, after = text.rpartition(answer)
    # Phi 3's template writes an end of text on the next line, so the first of them counts.
    marks = after.split()
    if not marks:
        return None
    # Only a token that was added for such a purpose: "###" is a word that an answer may hold.
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.content == marks[0]:
            return token_id
    return None


def tokenize_dataset(
    dataset: Dataset,
    tokenizer,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise every example, and leave out (with a warning) those without a supervised token.

    Returns:
        ``id``, ``cluster_id`` where rows have one, ``input_ids`` and ``labels``; see ``tokenize_example``.

    Raises:
        UserError: If no row has a label, or only some have a ``cluster_id``.
    """
    if "cluster_id" in dataset.column_names:
        clusters = dataset["cluster_id"][:]
        if None in clusters:
            row = dataset["id"][clusters.index(None)]
            raise UserError(f"row {row} has no cluster_id, and others have one; give it to every row, or to none")

    def tokenize(example: Row) -> dict[str, list[int]]:
        return tokenize_example(
            example,
            tokenizer,
            max_length=max_length,
            completion_only_loss=completion_only_loss,
        )

    # The tokens take the place of text and answer.
    dropped_columns = []
    for column in dataset.column_names:
        if column not in ("id", "cluster_id"):
            dropped_columns.append(column)
    tokenized = dataset.map(
        tokenize,
        remove_columns=dropped_columns,
        desc="Tokenizing",
        num_proc=num_proc,
        # The cache would not see that this module has changed.
        load_from_cache_file=False,
    )

    # A row whose answer lies behind max_length has no loss: its mean would be a division by 0.
    kept = []
    for index, labels in enumerate(tokenized["labels"]):
        has_label = any(label != IGNORED for label in labels)
        if has_label:
            kept.append(index)
    if not kept:
        raise UserError(
            f"every label is masked in all {len(dataset):,} rows: with max_length {max_length}, no token of an answer "
            "is left to learn from; raise max_length, or check that the rows have answers (assistant turns)"
        )

    # By one row: whether a border is torn depends on the template and the tokenizer.
    _warn_of_torn_prompt(dataset[0], tokenized[0]["input_ids"], tokenizer)
    num_left_out = len(tokenized) - len(kept)
    if num_left_out > 0:
        left_out = f"{num_left_out:,} of {len(tokenized):,} rows are left out"
        logger.warning("%s: within max_length %s they have no token to learn from", left_out, max_length)
    return tokenized.select(kept)


def _warn_of_torn_prompt(
    example: Row,
    input_ids: list[int],
    tokenizer,
) -> None:
    """Warn if a token spans the border between a prompt and its completion, by the first row."""
    if "prompt" not in example:
        return
    # The row may have been cut to max_length.
    ids = prompt_ids(example, tokenizer)
    ids = ids[: len(input_ids)]
    common = _common_length(ids, input_ids)
    if common < len(ids):
        logger.warning(
            "the tokens of a prompt alone and before its completion differ from %r on: the model generates after other "
            "tokens than it was trained after",
            tokenizer.decode(ids[common:]),
        )


def tokenizer_rules(tokenizer) -> dict[str, Any]:
    """Return the rules that turn text into tokens: vocabulary, merges, normalisation, special tokens."""
    # Only the fast tokenizers have a backend; of others, the vocabulary has to do.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str())

    # Truncation and padding are those of the last call, and not rules.
    rules = {}
    for key, value in content.items():
        if key not in ("truncation", "padding"):
            rules[key] = value
    return {
        "tokenizer": rules,
        "special_tokens": tokenizer.special_tokens_map,
        "added": [
            getattr(tokenizer, "add_bos_token", None),
            getattr(tokenizer, "add_eos_token", None),
        ],
    }


def supervised_token_count(dataset: Dataset) -> int:
    """Return the number of tokens with a label in a tokenised data set: those that one epoch takes the loss on."""
    count = 0
    # A row at a time, as the column is decoded lazily.
    for labels in dataset["labels"]:
        count += sum(label != IGNORED for label in labels)
    return count


def format_sample(
    tokenized_row: Row,
    tokenizer,
    max_chars: int = 600,
) -> str:
    """Return a tokenised row as text for the terminal, with the supervised parts in ``[[`` and ``]]``.

    A stretch longer than ``max_chars`` is shortened in its middle; control characters are shown as escapes.
    """

    def has_label(pair: tuple[int, int]) -> bool:
        return pair[1] != IGNORED

    # Stretches of tokens with a label, and of those without, in turn.
    parts = []
    pairs = zip(tokenized_row["input_ids"], tokenized_row["labels"], strict=True)
    for is_supervised, stretch in itertools.groupby(pairs, has_label):
        ids = [token for token, _ in stretch]
        text = tokenizer.decode(
            ids,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        if len(text) > max_chars:
            half = max_chars // 2
            text = f"{text[:half]} ... {text[-half:]}"

        # The row may be a stranger's, and control characters could rewrite the terminal.
        shown = ""
        for character in text:
            if character.isprintable() or character == "\n":
                shown += character
            else:
                # The escape, without the quotes around it.
                shown += repr(character)[1:-1]
        if is_supervised:
            shown = f"[[{shown}]]"
        parts.append(shown)
    return "".join(parts)


def _render_spans(example: Row, tokenizer) -> tuple[str, list[tuple[str, str]], bool]:
    """Return the text of an example, its supervised parts, and whether the chat template wrote the text.

    A part is a pair (before, until): the text up to where it begins, and up to where it ends.
    """
    # A conversation.
    if "messages" in example:
        text, spans = _assistant_turns(example["messages"], tokenizer)
        return text, spans, True

    # Plain text.
    if "prompt" not in example:
        text = example["text"]
        return text, [("", text)], False

    # A prompt and its completion, both text or both messages.
    prompt = example["prompt"]
    completion = example["completion"]
    if isinstance(prompt, str):
        text = prompt + completion
        before = _without_last_spaces(prompt)
        return text, [(before, text)], False
    text = _render(prompt + completion, tokenizer)
    before = _render(prompt, tokenizer, generation=True)
    return text, [(before, text)], True


def _without_last_spaces(prompt: str) -> str:
    """The part of a plain prompt that a model generates after; the spaces behind it are the answer's."""
    return prompt.rstrip(" ") or prompt


def _assistant_turns(messages: list[Message], tokenizer) -> tuple[str, list[tuple[str, str]]]:
    """Text of a conversation, and its assistant turns as pairs (before, until).

    Templates do not tell where turns are, so that the conversation is rendered up to each turn's header and end.
    """
    # Two renderings for each assistant turn, of some milliseconds.
    text = _render(messages, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        # Before the first message, templates have no header to render.
        if message["role"] != "assistant" or index == 0:
            continue

        before = _render(messages[:index], tokenizer, generation=True)
        until = text
        is_last = index == len(messages) - 1
        if not is_last:
            until = _render(messages[: index + 1], tokenizer)
        until = _as_earlier_turn(message, text, before, until)
        spans.append((before, until))
    return text, spans


def _as_earlier_turn(
    message: Message,
    text: str,
    before: str,
    until: str,
) -> str:
    """Return ``until`` as the beginning of ``text`` that ends with the same turn.

    Some templates write more around a turn when it is the last one: Qwen 3 an empty thought before it, Phi 3 an end of
    text after it. So the turn is the longest stretch after ``before`` in ``text`` that occurs in its rendering as last.
    """
    # Most templates write a turn in the same way wherever it is.
    if text.startswith(until):
        return until

    # The rendering up to the turn's header may differ from the whole near its end, too.
    start = _common_length(before, text)
    turn = until[_common_length(before, until) :]

    # The longest stretch after ``before`` that is in the turn: if one is not, no longer one is, so bisection finds it.
    def is_too_long(length: int) -> bool:
        return text[start : start + length] not in turn

    lengths = range(1, len(turn) + 1)
    length = bisect.bisect_left(lengths, True, key=is_too_long)
    found = text[start : start + length]

    # A stretch without the turn's last word (if it has one) is not the turn.
    last_word = message["content"].split()[-1:]
    if any(word not in found for word in last_word):
        raise UserError(
            "the chat template rewrites an assistant turn once more messages follow, so its tokens cannot be told "
            f"apart: {_shortened(message['content'])!r}; give such data as prompt and completion"
        )
    return text[: start + length]


def _render(
    messages: list[Message],
    tokenizer,
    generation: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds messages but the tokenizer has no chat template; use an instruct model's tokenizer, "
            "set chat_template_path, or give plain prompt and completion"
        )
    opening = _shortened(messages[0]["content"])
    problem = f"the chat template takes more than {_TEMPLATE_SECONDS:g} s for {opening!r}"
    with time_limit(_TEMPLATE_SECONDS, problem):
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                **template_arguments(tokenizer),
            )
        except UserError:
            # The time limit's.
            raise
        except Exception as error:
            # A template is a program of the model's author: it can raise anything.
            raise UserError(
                f"the chat template refuses the messages that begin {opening!r}: {first_line(error)}"
            ) from None


def template_arguments(tokenizer) -> dict[str, str]:
    """Arguments of ``apply_chat_template`` for prompts that are the same on every day."""
    arguments = {"date_string": _TEMPLATE_DAY.strftime("%d %b %Y")}
    template = tokenizer.chat_template
    # Several templates by name, of which transformers takes this one.
    if isinstance(template, dict):
        template = template.get("default")
    # The function itself cannot be given: transformers would make a text of it, which the template cannot call.
    if template and _ASKS_FOR_DAY.search(template):
        arguments["chat_template"] = _ASKS_FOR_DAY.sub(_fixed_day, template)
    return arguments


def _fixed_day(call: re.Match[str]) -> str:
    """The day as a text in the template's language, in place of a call that asks for it."""
    _, day_format = call.groups()
    return repr(_TEMPLATE_DAY.strftime(day_format))


def _encode(
    tokenizer,
    text: str,
    templated: bool,
) -> list[int]:
    """Tokenise; a chat template has written its own special tokens."""
    # Not verbose: no warning that a text is longer than the context. It may be cut to max_length.
    encoded = tokenizer(text, add_special_tokens=not templated, verbose=False)
    return encoded["input_ids"]


def _common_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common beginning of two sequences."""
    # Not strict: one may be longer than the other.
    pairs = zip(a, b, strict=False)
    for position, (x, y) in enumerate(pairs):
        if x != y:
            return position
    return min(len(a), len(b))


def _shortened(text: str, length: int = 60) -> str:
    if len(text) <= length:
        return text
    return text[:length] + "..."
