"""Formats of rows: the columns of published data sets, and what an example is made of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Dataset, Features, Value

from ..answers import ANSWER_MARK, parse_number
from ..errors import UserError

Row = Mapping[str, Any]
Message = dict[str, str]


def to_examples(rows: Iterable[tuple[str, Row]], name: str, as_chat: bool, text_field: str) -> Dataset:
    """Convert rows, each with the place where it stands, to examples. The first row decides which format they have."""
    examples: list[dict] = []
    copies: Counter[str] = Counter()
    columns: tuple[str, ...] = ()
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"holds {_kind(row)}, not an object")
            if not examples:
                columns = _recognised_columns(row, text_field)
            example = _FORMATS.get(columns, _from_text)(row, as_chat, *columns)
            if examples and type(example.get("prompt")) is not type(examples[0].get("prompt")):
                raise UserError("'prompt' is text in some rows and messages in others; use one of them throughout")
            content = json.dumps([row[column] for column in columns], sort_keys=True, default=str, ensure_ascii=False)
            identity = hashlib.sha256(content.encode()).hexdigest()[:16]
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no text can hold
            bad = error.object[error.start : error.end]
            raise UserError(f"{name}: {where}: {bad!r} is half a character; remove it or write it in full") from None
        except UserError as error:
            raise UserError(f"{name}: {where}: {error}") from None
        copies[identity] += 1
        example["id"] = identity if copies[identity] == 1 else f"{identity}#{copies[identity]}"
        examples.append(example)
    if not examples:
        raise UserError(f"{name} is empty: it has no rows")
    features = _features(examples[0], any("answer" in example for example in examples))
    return Dataset.from_dict({column: [e.get(column) for e in examples] for column in features}, features)


def _features(example: dict, with_answer: bool) -> Features:
    """Declare the columns, because guessing from the first rows fails where these hold no answer."""
    text = Value("string")
    columns = ["id", *(column for column in example if column not in ("id", "answer", "answer_type"))]
    columns += ["answer", "answer_type"] if with_answer else []
    messages = [{"role": text, "content": text}]
    return Features({column: messages if isinstance(example.get(column), list) else text for column in columns})


def _recognised_columns(row: Row, text_field: str) -> tuple[str, ...]:
    formats = [*_FORMATS, (text_field,)]
    for columns in formats:
        if all(column in row for column in columns):
            return columns
    raise UserError(
        f"no usable column among {', '.join(map(repr, row)) or 'none'}; "
        f"rename them to one of: {' | '.join(' + '.join(columns) for columns in formats)}"
    )


def _from_messages(row: Row, as_chat: bool, column: str) -> dict:
    return {"messages": _messages(row, column), **_reference(row)}


def _from_prompt_completion(row: Row, as_chat: bool, *columns: str) -> dict:
    if not all(isinstance(row.get(column), list) for column in columns):
        return {**{column: _text(row, column) for column in columns}, **_reference(row)}
    return {**{column: _messages(row, column) for column in columns}, **_reference(row)}


def _from_question_answer(row: Row, as_chat: bool, *columns: str) -> dict:
    question, answer = (_text(row, column) for column in columns)
    _, mark, final = answer.rpartition(ANSWER_MARK)
    if row.get("answer_type") is not None:
        reference = _reference(row)
    elif mark or answer_type_of(answer) == "number":
        number = parse_number(final)
        reference = _reference({"answer": final.strip() if number is None else f"{number:f}"})
    else:
        reference = {}  # a free text: no generated answer would equal it
    return {**_dialogue(question, answer, as_chat), **reference}


def _from_instruction(row: Row, as_chat: bool, *columns: str) -> dict:
    instruction, output = (_text(row, column) for column in columns)
    context = _text(row, "input") if row.get("input") else ""
    return {**_dialogue("\n\n".join(filter(None, (instruction, context))), output, as_chat), **_reference(row)}


def _from_text(row: Row, as_chat: bool, column: str) -> dict:
    return {column: _text(row, column), **_reference(row)}


# The columns of each published format, in the order of preference, and its reader. Any other column is plain text.
_FORMATS: dict[tuple[str, ...], Callable[..., dict]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_messages,  # ShareGPT
    ("prompt", "completion"): _from_prompt_completion,
    ("question", "answer"): _from_question_answer,  # GSM8K
    ("instruction", "output"): _from_instruction,  # Alpaca; "input" may be there too
}

_ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("system", "developer", "user", "assistant", "tool")
}


def _dialogue(question: str, answer: str, as_chat: bool) -> dict:
    if as_chat:
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _reference(row: Row) -> dict:
    """Return ``answer`` and ``answer_type`` where the row has a checkable answer."""
    answer = row.get("answer")
    if answer is None:
        return {}
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
    messages = []
    for n, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {n} of {column!r} is {_kind(message)}, not an object with role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role not in _ROLES:
            raise UserError(f"message {n} of {column!r} has role {role!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {n} of {column!r} has {_kind(content)} as content, not text")
        messages.append({"role": _ROLES[role], "content": content})
    return messages


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "nothing" if value is None else f"{value!r}" if isinstance(value, bool | int | float) else "text"
