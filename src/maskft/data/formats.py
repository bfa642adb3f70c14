"""Formats of rows: the columns of published data sets, and how each becomes an example."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from maskft_common.errors import UserError
from maskft_common.files import digest

from .answers import ANSWER_MARK, parse_number

# Examples that are Python objects at a time; as Arrow tables they take a fraction of the memory.
CHUNK_ROWS = 10_000

Row = Mapping[str, Any]
Message = dict[str, str]
# The columns of each format, in the order of preference, and its reader: (row, as_chat, *columns) -> example.
Formats = dict[tuple[str, ...], Callable[..., dict]]

# Beside the text: the answer to check, and the passage or template that a row shares with others.
OPTIONAL_COLUMNS = ("answer", "answer_type", "cluster_id")


def to_examples(
    rows: Iterable[tuple[str, Row]],
    name: str,
    as_chat: bool,
    text_field: str,
    formats: Formats | None = None,
    as_messages: bool = False,
) -> Dataset:
    """Convert rows, each with its place such as ``line 3``, to examples. The first row decides about their format.

    An id is a hash of the columns of the format, without Alpaca's ``input``; rows of one hash are numbered in their
    order: ``1f0c``, ``1f0c#2``.

    Args:
        rows: Pairs of a place and a row.
        name: Of the set, for errors.
        as_chat: Whether questions and answers become messages, or else plain text.
        text_field: Name of the column of plain text.
        formats: The formats that these rows may have. Default: every known one, and then plain text.
        as_messages: Whether a prompt and a completion that are messages become one conversation.

    Raises:
        UserError: For the first row that does not fit, with its place.
    """
    known = formats
    if known is None:
        known = FORMATS | {(text_field,): from_text}
    columns: tuple[str, ...] = ()
    first: dict | None = None
    examples: list[dict] = []
    chunks: list[Dataset] = []
    num_with_hash: Counter[str] = Counter()
    for place, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"holds {_kind(row)}, not an object")
            if first is None:
                columns = _recognised_columns(row, known)
            example = known[columns](row, as_chat, *columns)
            if as_messages and isinstance(example.get("prompt"), list):
                example["messages"] = example.pop("prompt") + example.pop("completion")
            _check_like_first(example, first)
            if row.get("cluster_id") is not None:
                example["cluster_id"] = str(row["cluster_id"])
            identity = _identity(row, columns, example)
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise UserError(f"{name}: {place}: {half!r} is half a surrogate pair; remove it") from None
        except UserError as error:
            raise UserError(f"{name}: {place}: {error}") from None

        num_with_hash[identity] += 1
        number = num_with_hash[identity]
        example["id"] = identity if number == 1 else f"{identity}#{number}"
        if first is None:
            first = example

        examples.append(example)
        if len(examples) == CHUNK_ROWS:
            chunks.append(_chunk(examples, first))
            examples = []

    if first is None:
        raise UserError(f"{name} is empty: it has no rows")
    dataset = concatenate_datasets([*chunks, _chunk(examples, first)])
    return _without_empty_columns(dataset)


def _check_like_first(example: dict, first: dict | None) -> None:
    """Raise if the prompt has another type than that of the first row: a column of a data set has one type."""
    if first is None:
        return
    kind = type(example.get("prompt"))
    kind_of_first = type(first.get("prompt"))
    if kind is not kind_of_first:
        raise UserError("'prompt' is text in some rows and messages in others; use one of them throughout")


def _identity(row: Row, columns: tuple[str, ...], example: dict) -> str:
    """Hash of the columns of the format.

    Raises:
        UnicodeEncodeError: If a text holds half of a surrogate pair, which JSON can spell and no file can store.
    """
    # The optional columns are no part of the hash, but stored as well: encoding them raises for such a text.
    for column in OPTIONAL_COLUMNS:
        text = example.get(column) or ""
        text.encode()

    values = [row[column] for column in columns]
    content = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return digest(content)[:16]


def _without_empty_columns(dataset: Dataset) -> Dataset:
    """Drop the optional columns that no row has."""
    dropped = []
    if all(answer is None for answer in dataset["answer"][:]):
        dropped += ["answer", "answer_type"]
    if all(cluster is None for cluster in dataset["cluster_id"][:]):
        dropped.append("cluster_id")
    if dropped:
        dataset = dataset.remove_columns(dropped)
    return dataset


def _chunk(examples: list[dict], first: dict) -> Dataset:
    """Store examples in a data set.

    Their columns are declared, those of answers too: datasets guesses types, and cannot where all values are missing.
    """
    text = Value("string")
    messages = [{"role": text, "content": text}]

    features: dict[str, Any] = {"id": text}
    for column, value in first.items():
        if column != "id" and column not in OPTIONAL_COLUMNS:
            features[column] = messages if isinstance(value, list) else text
    for column in OPTIONAL_COLUMNS:
        features[column] = text

    values = {column: [example.get(column) for example in examples] for column in features}
    return Dataset.from_dict(values, Features(features))


def _recognised_columns(row: Row, formats: Formats) -> tuple[str, ...]:
    for columns in formats:
        if all(column in row for column in columns):
            return columns
    found = ", ".join(map(repr, row)) or "none"
    expected = " | ".join(" + ".join(columns) for columns in formats)
    raise UserError(f"no usable column among {found}; rename them to one of: {expected}")


def from_messages(row: Row, as_chat: bool, column: str) -> dict:
    """Read a conversation as it is."""
    return {"messages": _messages(row, column), **_reference(row)}


def from_prompt_completion(row: Row, as_chat: bool, *columns: str) -> dict:
    """Read a prompt and its completion, both text or both messages."""
    are_messages = all(isinstance(row.get(column), list) for column in columns)
    read = _messages if are_messages else _text
    example = {column: read(row, column) for column in columns}
    return {**example, **_reference(row)}


def from_question_answer(row: Row, as_chat: bool, *columns: str) -> dict:
    """Read a question and its solution. The answer to check is the text after ``####``, or a solution that is a number.

    A solution in free text has no answer to check: no generated text would equal it.
    """
    question, answer = (_text(row, column) for column in columns)
    _, mark, final = answer.rpartition(ANSWER_MARK)  # without the mark, final is all of the answer
    if row.get("answer_type") is not None:
        reference = _reference(row)
    elif mark or answer_type_of(answer) == "number":
        number = parse_number(final)
        # A number is stored without thousands separators and exponent.
        checked = final.strip() if number is None else f"{number:f}"
        reference = _reference({"answer": checked})
    else:
        reference = {}
    return {**_dialogue(question, answer, as_chat), **reference}


def from_instruction(row: Row, as_chat: bool, *columns: str) -> dict:
    """Read an instruction or a query, the input it is about (if any), and the output."""
    instruction, output = (_text(row, column) for column in columns)
    question = instruction
    if row.get("input"):
        context = _text(row, "input")
        question = f"{instruction}\n\n{context}" if instruction else context
    return {**_dialogue(question, output, as_chat), **_reference(row)}


def from_system_question(row: Row, as_chat: bool, *columns: str) -> dict:
    """Read a question and a response given under a system prompt, which may be empty."""
    system, question, response = (_text(row, column) for column in columns)
    return {**_dialogue(question, response, as_chat, system), **_reference(row)}


def from_text(row: Row, as_chat: bool, column: str) -> dict:
    """Read plain text."""
    return {"text": _text(row, column), **_reference(row)}


# The formats that are recognised by their columns alone.
FORMATS: Formats = {
    ("messages",): from_messages,
    ("conversations",): from_messages,  # ShareGPT
    ("prompt", "completion"): from_prompt_completion,
    ("question", "answer"): from_question_answer,  # GSM8K
    ("instruction", "output"): from_instruction,  # Alpaca; "input" may be there too
    ("query", "response"): from_instruction,  # MetaMathQA
    ("system_prompt", "question", "response"): from_system_question,  # Open-Orca
}

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",  # ShareGPT
    "gpt": "assistant",
}
# Keys of a message that chat templates write beside its content; others are notes, such as a time or a score.
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _dialogue(question: str, answer: str, as_chat: bool, system: str = "") -> dict:
    """One question and its answer, as messages or as plain text."""
    if not as_chat:
        opening = f"{system}\n\n" if system else ""
        # The space is the completion's, as most tokenizers join a space to the word after it.
        return {"prompt": f"{opening}Question: {question}\nAnswer:", "completion": f" {answer}"}

    prompt = []
    if system:
        prompt.append({"role": "system", "content": system})
    prompt.append({"role": "user", "content": question})
    completion = [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": completion}


def _reference(row: Row) -> dict:
    """Return ``answer`` and ``answer_type`` where the row has a checkable answer."""
    answer = row.get("answer")
    if answer is None:
        return {}
    # In Python a bool is an int, too.
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"'answer' holds {_kind(answer)}, not text or a number")
    answer_type = row.get("answer_type") or answer_type_of(str(answer))
    if answer_type not in ("number", "exact"):
        raise UserError(f"'answer_type' is {answer_type!r}; it must be 'number' or 'exact'")
    return {"answer": str(answer), "answer_type": answer_type}


def answer_type_of(answer: str) -> str:
    """Return how an answer is compared: as a ``number``, or as ``exact`` text."""
    return "exact" if parse_number(answer) is None else "number"


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise UserError(f"{column!r} is missing")
    if not isinstance(row[column], str):
        raise UserError(f"{column!r} holds {_kind(row[column])}, not text")
    return row[column]


def _messages(row: Row, column: str) -> list[Message]:
    """Read ``[{"role", "content"}]``, or ShareGPT's ``[{"from", "value"}]``."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise UserError(f"{column!r} holds {_kind(value)}, not a list of messages")
    if row.get("tools") not in (None, "", "[]", []):
        raise UserError("'tools' is not empty, and tools are not put into the prompt; write them into a system message")
    messages = []
    for n, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {n} of {column!r} is {_kind(message)}, not an object with role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"message {n} of {column!r} has role {role!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {n} of {column!r} has {_kind(content)} as content, not text")
        for key in _BESIDE_CONTENT:
            if message.get(key):
                raise UserError(f"message {n} of {column!r} has {key!r}, which is not read; write it into its content")
        messages.append({"role": _ROLES[role], "content": content})
    return messages


def _kind(value: Any) -> str:
    """A value in the words of JSON, for errors."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    return repr(value)[:40]
