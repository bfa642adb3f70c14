"""Formats of rows: the columns of published data sets, and how each becomes an example."""

from __future__ import annotations

import json
import math
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
        # Plain text comes last: a row may have a column of text beside a conversation.
        known = FORMATS | {(text_field,): from_text}

    # The format and the example of the first row; None until it is read.
    columns: tuple[str, ...] = ()
    first: dict | None = None
    # Rows of the chunk that is being filled, and the chunks that are full.
    examples: list[dict] = []
    chunks: list[Dataset] = []
    num_with_hash: Counter[str] = Counter()
    for place, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"holds {_kind(row)}, not an object")
            if first is None:
                columns = _recognised_columns(row, known)
            reader = known[columns]
            example = reader(row, as_chat, *columns)
            # The sets of a mixture must have the same columns.
            if as_messages and isinstance(example.get("prompt"), list):
                prompt = example.pop("prompt")
                completion = example.pop("completion")
                _check_one_answer(prompt, completion)
                example["messages"] = prompt + completion
            _check_like_first(example, first)

            cluster = row.get("cluster_id")
            # Rows without a cluster are not of one cluster.
            if not _is_blank(cluster):
                example["cluster_id"] = str(cluster)
            identity = _identity(row, columns, example)
        except UnicodeEncodeError as error:
            raise UserError(f"{name}: {place}: {half_pair(error)}") from None
        except UserError as error:
            # Readers know neither the set nor the place.
            raise UserError(f"{name}: {place}: {error}") from None

        # Ids are unique: the second of two equal rows is 1f0c#2.
        num_with_hash[identity] += 1
        number = num_with_hash[identity]
        example["id"] = identity
        if number > 1:
            example["id"] = f"{identity}#{number}"
        if first is None:
            first = example

        examples.append(example)
        if len(examples) == CHUNK_ROWS:
            chunk = _chunk(examples, first)
            chunks.append(chunk)
            examples = []

    if first is None:
        raise UserError(f"{name} is empty: it has no rows")
    last_chunk = _chunk(examples, first)
    dataset = concatenate_datasets([*chunks, last_chunk])
    return _without_empty_columns(dataset)


def _check_one_answer(prompt: list[dict], completion: list[dict]) -> None:
    """Raise if the tokens that are trained would differ between prompt and completion, and one conversation.

    A conversation is trained on every answer of the assistant, a completion on all its messages.
    """
    if any(message["role"] == "assistant" for message in prompt):
        raise UserError(
            "'prompt' holds an answer of the assistant, which a mixture would train on too; "
            "give 'messages', or name this set alone"
        )
    if any(message["role"] != "assistant" for message in completion):
        raise UserError(
            "'completion' holds a message that is not the assistant's, which a mixture would not train on; "
            "give 'messages', or name this set alone"
        )


def _check_like_first(example: dict, first: dict | None) -> None:
    """Raise if the prompt has another type than that of the first row: a column of a data set has one type."""
    if first is None:
        return
    kind = type(example.get("prompt"))
    kind_of_first = type(first.get("prompt"))
    if kind is not kind_of_first:
        raise UserError("'prompt' is text in some rows and messages in others; use one of them throughout")


def _identity(
    row: Row,
    columns: tuple[str, ...],
    example: dict,
) -> str:
    """Hash of the columns of the format.

    Raises:
        UnicodeEncodeError: If a text holds a lone surrogate, which JSON can spell and no file can store.
    """
    # The optional columns are not hashed, but they are stored: encoding them raises for such a text.
    for column in OPTIONAL_COLUMNS:
        text = example.get(column) or ""
        text.encode()

    # Taken from the row as it is in the file, not from the example: as_chat does not change the id.
    values = [row[column] for column in columns]
    # Sorted keys: a message is the same with its content before its role. Values that JSON does not have, such as dates
    # of a Parquet file, are hashed as text.
    content = json.dumps(
        values,
        sort_keys=True,
        default=str,
        ensure_ascii=False,
    )
    # 64 bits: among ten million rows two different ones collide with a probability of 3 in a million.
    return digest(content)[:16]


def _without_empty_columns(dataset: Dataset) -> Dataset:
    """Drop the optional columns that no row has."""
    # A slice is a list in memory; the column itself would decode a row at a time.
    answers = dataset["answer"][:]
    clusters = dataset["cluster_id"][:]
    dropped = []
    if all(answer is None for answer in answers):
        dropped += ["answer", "answer_type"]
    if all(cluster is None for cluster in clusters):
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
        if column == "id" or column in OPTIONAL_COLUMNS:
            continue
        features[column] = messages if isinstance(value, list) else text
    # In every chunk, and at the same place: only alike chunks can be concatenated.
    for column in OPTIONAL_COLUMNS:
        features[column] = text

    values = {}
    for column in features:
        values[column] = [example.get(column) for example in examples]
    return Dataset.from_dict(values, Features(features))


def _recognised_columns(row: Row, formats: Formats) -> tuple[str, ...]:
    """The columns of the first format that the row has.

    Raises:
        UserError: If it has those of none.
    """
    for columns in formats:
        if all(column in row for column in columns):
            return columns

    # repr, because the names are those of a file.
    found = ", ".join(map(repr, row)) or "none"
    choices = [" + ".join(columns) for columns in formats]
    expected = " | ".join(choices)
    raise UserError(f"no usable column among {found}; rename them to one of: {expected}")


# Readers. Their arguments: the row, whether questions and answers become messages, and the columns of the format.


def from_messages(
    row: Row,
    as_chat: bool,
    column: str,
) -> dict:
    """Read a conversation as it is."""
    messages = _messages(row, column)
    return {"messages": messages, **_reference(row)}


def from_prompt_completion(
    row: Row,
    as_chat: bool,
    *columns: str,
) -> dict:
    """Read a prompt and its completion, both text or both messages."""
    # If only one of them is a list, it is an error, which _text raises.
    are_messages = all(isinstance(row.get(column), list) for column in columns)
    read = _messages if are_messages else _text
    example = {}
    for column in columns:
        example[column] = read(row, column)
    return {**example, **_reference(row)}


def from_question_answer(
    row: Row,
    as_chat: bool,
    *columns: str,
) -> dict:
    """Read a question and its solution. The answer to check is the text after ``####``, or a solution that is a number.

    A solution in free text has no answer to check: no generated text would equal it.
    """
    question, answer = (_text(row, column) for column in columns)
    # Without the mark, final is all of the answer.
    _, mark, final = answer.rpartition(ANSWER_MARK)
    # With a type, the whole column is the answer to check, and not a solution.
    if not _is_blank(row.get("answer_type")):
        reference = _reference(row)
    elif mark or answer_type_of(answer) == "number":
        checked = final.strip()
        number = parse_number(final)
        if number is not None:
            # Stored without thousands separators and exponent.
            checked = f"{number:f}"
        reference = _reference({"answer": checked})
    else:
        reference = {}
    dialogue = _dialogue(question, answer, as_chat)
    return {**dialogue, **reference}


def from_instruction(
    row: Row,
    as_chat: bool,
    *columns: str,
) -> dict:
    """Read an instruction or a query, the input it is about (if any), and the output."""
    instruction, output = (_text(row, column) for column in columns)
    question = instruction
    if row.get("input"):
        context = _text(row, "input")
        # Not hashed for the id, but stored: a lone surrogate raises here, as in _identity.
        context.encode()
        # Some sets have everything in the input, and an empty instruction.
        question = f"{instruction}\n\n{context}" if instruction else context
    dialogue = _dialogue(question, output, as_chat)
    return {**dialogue, **_reference(row)}


def from_system_question(
    row: Row,
    as_chat: bool,
    *columns: str,
) -> dict:
    """Read a question and a response given under a system prompt, which may be empty."""
    system, question, response = (_text(row, column) for column in columns)
    dialogue = _dialogue(question, response, as_chat, system)
    return {**dialogue, **_reference(row)}


def from_text(
    row: Row,
    as_chat: bool,
    column: str,
) -> dict:
    """Read plain text."""
    text = _text(row, column)
    return {"text": text, **_reference(row)}


# The formats that are recognised by their columns alone.
FORMATS: Formats = {
    ("messages",): from_messages,
    # ShareGPT.
    ("conversations",): from_messages,
    ("prompt", "completion"): from_prompt_completion,
    # GSM8K.
    ("question", "answer"): from_question_answer,
    # Alpaca; "input" may be there too.
    ("instruction", "output"): from_instruction,
    # MetaMathQA.
    ("query", "response"): from_instruction,
    # Open-Orca.
    ("system_prompt", "question", "response"): from_system_question,
}

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # ShareGPT.
    "human": "user",
    "gpt": "assistant",
}
# Keys of a message that chat templates write beside its content; others are notes, such as a time or a score.
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


# A question as `_dialogue` writes it in plain text.
_BEFORE_QUESTION = "Question: "
_AFTER_QUESTION = "\nAnswer:"


def question_in(prompt: str) -> str | None:
    """The question of a prompt in plain text; None if the prompt has another form, or a text before the question."""
    if not prompt.startswith(_BEFORE_QUESTION) or not prompt.endswith(_AFTER_QUESTION):
        return None
    return prompt.removeprefix(_BEFORE_QUESTION).removesuffix(_AFTER_QUESTION)


def _dialogue(
    question: str,
    answer: str,
    as_chat: bool,
    system: str = "",
) -> dict:
    """One question and its answer, as messages or as plain text."""
    # Plain text, for tokenizers without a chat template.
    if not as_chat:
        opening = f"{system}\n\n" if system else ""
        return {
            "prompt": f"{opening}{_BEFORE_QUESTION}{question}{_AFTER_QUESTION}",
            # The space is the completion's, as most tokenizers join a space to the word after it.
            "completion": f" {answer}",
        }

    prompt = []
    if system:
        prompt.append({"role": "system", "content": system})
    prompt.append({"role": "user", "content": question})
    completion = [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": completion}


def _reference(row: Row) -> dict:
    """Return ``answer`` and ``answer_type`` where the row has a checkable answer."""
    answer = row.get("answer")
    if _is_missing(answer):
        return {}
    # In Python a bool is an int, too.
    is_text_or_number = isinstance(answer, str | int | float) and not isinstance(answer, bool)
    if not is_text_or_number:
        raise UserError(f"'answer' holds {_kind(answer)}, not text or a number")
    text = str(answer)

    answer_type = row.get("answer_type")
    if _is_blank(answer_type):
        answer_type = answer_type_of(text)
    if answer_type not in ("number", "exact"):
        raise UserError(f"'answer_type' is {answer_type!r}; it must be 'number' or 'exact'")
    return {"answer": text, "answer_type": answer_type}


def answer_type_of(answer: str) -> str:
    """Return how an answer is compared: as a ``number``, or as ``exact`` text."""
    if parse_number(answer) is None:
        return "exact"
    return "number"


def half_pair(error: UnicodeEncodeError) -> str:
    """What is wrong with a text that has half a surrogate pair, and what to do."""
    half = error.object[error.start : error.end]
    return f"{half!r} is half a surrogate pair; remove it"


def _is_missing(value: Any) -> bool:
    """Whether an optional column has no value in a row: null, or NaN, which pandas writes there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_blank(value: Any) -> bool:
    """Whether it has none in a CSV file either, where a missing value is a blank cell."""
    return _is_missing(value) or value == ""


def _text(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        UserError: If the row has no such column, or another value in it.
    """
    if column not in row:
        raise UserError(f"{column!r} is missing")
    text = row[column]
    if not isinstance(text, str):
        raise UserError(f"{column!r} holds {_kind(text)}, not text")
    return text


def _messages(row: Row, column: str) -> list[Message]:
    """Read ``[{"role", "content"}]``, or ShareGPT's ``[{"from", "value"}]``."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise UserError(f"{column!r} holds {_kind(value)}, not a list of messages")
    # Sets without tools have an empty list or an empty text there.
    if row.get("tools") not in (None, "", "[]", []):
        raise UserError("'tools' is not empty, and tools are not put into the prompt; write them into a system message")

    messages = []
    for number, message in enumerate(value, start=1):
        of_column = f"message {number} of {column!r}"
        if not isinstance(message, Mapping):
            raise UserError(f"{of_column} is {_kind(message)}, not an object with role and content")
        # ShareGPT's names where the usual ones are missing.
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{of_column} has role {role!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{of_column} has {_kind(content)} as content, not text")
        for key in _BESIDE_CONTENT:
            if message.get(key):
                raise UserError(f"{of_column} has {key!r}, which is not read; write it into its content")
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
