"""Data: published formats -> examples -> token ids and labels.

An example is a row of a ``datasets.Dataset`` with an ``id`` (a hash of its content), and either ``messages`` (a list of
``{"role", "content"}``), or ``prompt`` and ``completion`` (both text, or both lists of messages), or one text column;
and, where the answer can be checked, ``answer`` and ``answer_type`` (see ``answers.check_answer``).
"""

from __future__ import annotations

import bisect
import gzip
import hashlib
import io
import itertools
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, Features, Value
from jinja2 import TemplateError

from .answers import ANSWER_MARK, parse_number
from .data_arguments import DataArguments
from .errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token without loss, as in torch's cross_entropy

FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
OTHER_FILE_ENDINGS = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".yml", ".md")
PROCEDURAL_PREFIX = "reasoning-gym/"

Row = Mapping[str, Any]
Message = dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitReport:
    """How many rows were read and what became of them."""

    read: int
    dropped_overlap: int
    train: int
    heldout: int

    def __str__(self) -> str:
        return (
            f"read {self.read:,} rows: {self.train:,} to train on, {self.heldout:,} held out; "
            f"{self.dropped_overlap:,} left out of training because their prompt is held out"
        )


class Splits(NamedTuple):
    """What ``load_splits`` returns."""

    train: Dataset
    heldout: Dataset
    report: SplitReport


def load_splits(args: DataArguments, seed: int, tokenizer=None, text_field: str = "text") -> Splits:
    """Read the training data and the held-out data, and remove from training what is held out.

    The held-out rows are never reduced by the removal. The same arguments and seed give the same rows; runs that are to
    be compared item by item need the same seed here, whatever seed they train with.

    Args:
        args: The data part of the recipe.
        seed: Chooses the rows held out of the training data, and the exercises of a procedural task.
        tokenizer: Decides about chat or plain text where ``args.as_chat`` does not. None counts as having a template.
        text_field: Name of the column that holds plain text.

    Raises:
        UserError: If a name, a file, a row or a number in ``args`` cannot be used.
    """
    for name in ("max_train_samples", "max_eval_samples", "procedural_train_size", "procedural_eval_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if not args.dataset_name:
        raise UserError("dataset_name is missing; give a data file, a hub name or reasoning-gym/TASK")

    common = {
        "as_chat": args.as_chat,
        "tokenizer": tokenizer,
        "text_field": text_field,
        "options": args.procedural_options,
    }
    train = load_examples(
        args.dataset_name,
        args.dataset_train_split,
        config=args.dataset_config,
        size=args.procedural_train_size,
        seed=_procedural_seed(seed, "train"),
        **common,
    )
    heldout_name = args.eval_dataset_name
    if not heldout_name and (args.dataset_eval_split or args.dataset_name.startswith(PROCEDURAL_PREFIX)):
        heldout_name = args.dataset_name
    if heldout_name:
        if args.dataset_eval_split and not _is_hub_name(heldout_name):
            raise UserError(
                f"dataset_eval_split is {args.dataset_eval_split!r}, but {heldout_name} has no splits; "
                "name the held-out data with eval_dataset_name, or hold out a part with eval_split_size"
            )
        heldout = load_examples(
            heldout_name,
            args.dataset_eval_split or "test",
            config=args.dataset_config if heldout_name == args.dataset_name else None,
            size=args.procedural_eval_size,
            seed=_procedural_seed(seed, "heldout"),
            **common,
        )
        read = len(train) + len(heldout)
    else:
        read = len(train)
        train, heldout = _hold_out(train, args.eval_split_size, seed, args.dataset_name)

    held_prompts = {_prompt_digest(example) for example in heldout}
    kept = [index for index, example in enumerate(train) if _prompt_digest(example) not in held_prompts]
    dropped = len(train) - len(kept)
    if not kept:
        raise UserError(
            f"all {len(train):,} training rows of {args.dataset_name} have a prompt that is also held out; "
            "give other held-out data, or a smaller eval_split_size or procedural_eval_size"
        )
    train = train.select(kept[: args.max_train_samples])
    heldout = heldout.select(range(min(len(heldout), args.max_eval_samples or len(heldout))))
    return Splits(train, heldout, SplitReport(read, dropped, len(train), len(heldout)))


def load_examples(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    as_chat: bool | None = None,
    tokenizer=None,
    text_field: str = "text",
    size: int = 500,
    seed: int = 0,
    options: dict | None = None,
) -> Dataset:
    """Read one split of a file, a hub data set or a procedural task as examples (see the module's docstring).

    ``split`` and ``config`` are for hub data sets; ``size``, ``seed`` and ``options`` for procedural tasks.
    """
    if name.startswith(PROCEDURAL_PREFIX):
        task = name.removeprefix(PROCEDURAL_PREFIX)
        rows = _numbered(_procedural_rows(task, size, seed, options or {}, plain=as_chat is not True))
    elif _is_hub_name(name):
        rows = _numbered(_load_from_hub(name, config, split))
    else:
        rows = _read_file(Path(name).expanduser())
    if as_chat is None:
        as_chat = tokenizer is None or bool(tokenizer.chat_template)
    return _examples(rows, name, as_chat, text_field)


def _hold_out(examples: Dataset, size: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Split off ``size`` rows: those whose prompt has the smallest seeded hash, so that their order does not matter."""
    if size <= 0 or (size >= 1 and size != int(size)):
        raise UserError(f"eval_split_size is {size}; it must be a whole number of rows, or a fraction below 1")
    count = int(size) if size >= 1 else max(1, round(size * len(examples)))
    if count >= len(examples):
        raise UserError(
            f"eval_split_size {size:g} holds out {count:,} of the {len(examples):,} rows of {name}, "
            "which leaves none to train on; make it smaller"
        )

    def rank(index: int) -> tuple[bytes, str]:
        example = examples[index]
        return hashlib.sha256(f"{seed}".encode() + _prompt_digest(example)).digest(), example["id"]

    ranked = sorted(range(len(examples)), key=rank)
    return examples.select(sorted(ranked[count:])), examples.select(sorted(ranked[:count]))


def _prompt_digest(example: Row) -> bytes:
    """Hash the words before the first answer, without system messages: two examples are the same if these agree."""
    if "messages" in example or not isinstance(example.get("prompt", ""), str):
        messages = example.get("messages") or example["prompt"]
        opening = []
        for message in messages:
            if message["role"] == "assistant":
                break
            if message["role"] != "system":
                opening.append(message["content"])
        text = "\n".join(opening)
    elif "prompt" in example:
        text = example["prompt"]
    else:
        text = next(value for column, value in example.items() if column not in ("id", "answer", "answer_type"))
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


# ---------------------------------------------------------------------------------------------------------------------
# Sources of rows
# ---------------------------------------------------------------------------------------------------------------------


def _is_hub_name(name: str) -> bool:
    """Whether ``name`` can only mean a hub data set: it does not exist here and does not look like a file."""
    path = Path(name).expanduser()
    looks_like_file = name.startswith((".", "/", "~")) or name.lower().endswith(FILE_ENDINGS + OTHER_FILE_ENDINGS)
    return not (looks_like_file or path.exists() or name.startswith(PROCEDURAL_PREFIX))


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"row {n}", row) for n, row in enumerate(rows, start=1))


def _similar_file(path: Path) -> str:
    try:
        return did_you_mean(path.name, sorted(sibling.name for sibling in path.parent.iterdir()))
    except OSError:
        return ""


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row of a data file with the place where it stands, such as ``line 3``."""
    if not path.exists():
        raise UserError(f"data file {path} does not exist{_similar_file(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one file in it ({', '.join(FILE_ENDINGS)})")
    if not path.name.lower().endswith(FILE_ENDINGS):
        raise UserError(f"data file {path} has an unsupported ending; convert it to one of {', '.join(FILE_ENDINGS)}")
    try:
        yield from _parquet_rows(path) if path.name.lower().endswith(".parquet") else _json_rows(path)
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors are among these
        raise UserError(f"data file {path} cannot be read: {_first_line(error)}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        # A .json file may hold one array, or like .jsonl one object per line.
        if ".jsonl" not in path.name.lower():
            text = lines.read()
            if text.lstrip().startswith("["):
                yield from _numbered(_parse_json(text, path, first_line=1))
                return
            lines = io.StringIO(text)
        for n, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {n}", _parse_json(line, path, first_line=n)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"data file {path} is not JSON at line {line}: {error.msg} (column {error.colno})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} is not a readable parquet file: {_first_line(error)}") from None


def _load_from_hub(name: str, config: str | None, split: str) -> Dataset:
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # many types: no network, no such name, no such configuration or split
        raise UserError(
            f"{name!r} is no file here{_similar_file(Path(name))} and the hub gave no split {split!r} of it: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _procedural_seed(seed: int, role: str) -> int:
    """Spread seeds far apart: reasoning-gym makes item i from ``seed + i``, so seeds 1 and 2 share nearly all items."""
    return Random(f"{role}-{seed}").randrange(2**31)


def _procedural_rows(task: str, size: int, seed: int, options: dict, plain: bool) -> Iterator[Row]:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(
            f"{PROCEDURAL_PREFIX}{task} needs the package reasoning-gym; install it with: pip install reasoning-gym"
        ) from None
    if task not in DATASETS:
        raise UserError(f"reasoning-gym has no task {task!r}{did_you_mean(task, DATASETS)}")
    known = [field for field in DATASETS[task][1].__dataclass_fields__ if field not in ("size", "seed")]
    for option in options:
        if option not in known:
            raise UserError(
                f"procedural_options: {task} has no option {option!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(known)}"
            )
    try:
        items = create_dataset(task, size=size, seed=seed, **options)
    except Exception as error:  # each task checks its options with asserts of its own
        raise UserError(f"procedural_options {options} do not suit {task}: {_first_line(error)}") from None
    for item in items:
        question, answer = item["question"], item["answer"]
        if answer is None:
            raise UserError(f"reasoning-gym task {task!r} has no single right answer to train on; choose another task")
        reference = {"answer": answer, "answer_type": _answer_type(answer)}
        # Elsewhere "expression" is the solution itself (countdown) or a part of the question (circuit_logic).
        expression = item["metadata"].get("expression")
        if plain and isinstance(expression, str) and expression in question:
            yield {"prompt": f"{expression} =", "completion": f" {answer}", **reference}
        else:
            yield {"question": question, **reference}


# ---------------------------------------------------------------------------------------------------------------------
# Formats of rows
# ---------------------------------------------------------------------------------------------------------------------


def _examples(rows: Iterable[tuple[str, Row]], name: str, as_chat: bool, text_field: str) -> Dataset:
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
    elif mark or _answer_type(answer) == "number":
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
    answer_type = row.get("answer_type") or _answer_type(str(answer))
    if answer_type not in ("number", "exact"):
        raise UserError(f"'answer_type' is {answer_type!r}; it must be 'number' or 'exact'")
    return {"answer": str(answer), "answer_type": answer_type}


def _answer_type(answer: str) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def tokenize_example(
    example: Row,
    tokenizer,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    text_field: str = "text",
) -> dict[str, list[int]]:
    """Turn an example into token ids and labels; the one tokenisation for training and for evaluation.

    Loss is taken on the completion, or on every assistant turn of ``messages`` (what the chat template writes after the
    turn's header, with the end-of-turn token), or on all of a text. Plain text ends with the end-of-sequence token. As
    in TRL, a completion starts where the tokens of the prompt alone and of the whole diverge: where a token spans the
    border, that token is trained on. The first token has no label, as nothing predicts it; nor has an assistant turn
    that opens a conversation.

    Args:
        example: A row of ``load_examples``.
        tokenizer: A transformers tokenizer.
        max_length: Number of tokens to keep, from the start. None keeps all.
        completion_only_loss: False takes the loss on every token.
        text_field: Name of the column that holds plain text.

    Returns:
        ``input_ids`` and ``labels``, equally long; a label is the token's id, or -100 for no loss.
    """
    text, spans, templated = _render_spans(example, tokenizer, text_field)
    input_ids = _encode(tokenizer, text, templated)
    if not templated:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, so a model could not learn where to stop; set one")
        if input_ids[-1:] != [tokenizer.eos_token_id]:
            input_ids.append(tokenizer.eos_token_id)
    labels = [IGNORED] * len(input_ids)
    for before, until in spans if completion_only_loss else [("", text)]:
        start = max(1, _common_length(_encode(tokenizer, before, templated), input_ids)) if before else 1
        end = len(input_ids) if until == text else _common_length(_encode(tokenizer, until, templated), input_ids)
        labels[start:end] = input_ids[start:end]
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}


def prompt_ids(example: Row, tokenizer) -> list[int]:
    """Return the token ids after which a model generates its answer: those before the (last) assistant turn."""
    if "messages" in example:
        turns = [n for n, message in enumerate(example["messages"]) if message["role"] == "assistant"]
        prompt = example["messages"][: turns[-1]] if turns else example["messages"]
    elif "prompt" in example:
        prompt = example["prompt"]
    else:
        raise UserError("plain text has no prompt to generate from; give data with prompts")
    if not isinstance(prompt, str):
        return _encode(tokenizer, _render(prompt, tokenizer, generation=True), templated=True)
    ids = _encode(tokenizer, prompt, templated=False)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers end every text with it


def tokenize_dataset(
    dataset: Dataset,
    tokenizer,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    text_field: str = "text",
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise every example, and leave out (with a warning) those of which nothing is trained on.

    Returns:
        ``id``, ``input_ids`` and ``labels``; see ``tokenize_example``.

    Raises:
        UserError: If no row has a label.
    """
    kwargs = {"max_length": max_length, "completion_only_loss": completion_only_loss, "text_field": text_field}
    tokenized = dataset.map(
        lambda example: tokenize_example(example, tokenizer, **kwargs),
        remove_columns=[column for column in dataset.column_names if column != "id"],
        desc="Tokenizing",
        num_proc=num_proc,
        load_from_cache_file=False,  # the cache would not see that this module has changed
    )
    kept = [n for n, labels in enumerate(tokenized["labels"]) if any(label != IGNORED for label in labels)]
    if not kept:
        raise UserError(
            f"every label is masked in all {len(dataset):,} rows: with max_length {max_length}, no token of an answer "
            "is left to learn from; raise max_length, or check that the rows have answers (assistant turns)"
        )
    _warn_of_torn_prompt(dataset[0], tokenized[0]["input_ids"], tokenizer)
    if len(kept) < len(tokenized):
        logger.warning(
            "%s of %s rows are left out: within max_length %s they have no token to learn from",
            f"{len(tokenized) - len(kept):,}",
            f"{len(tokenized):,}",
            max_length,
        )
        tokenized = tokenized.select(kept)
    return tokenized


def _warn_of_torn_prompt(example: Row, input_ids: list[int], tokenizer) -> None:
    if "prompt" not in example:
        return
    ids = prompt_ids(example, tokenizer)[: len(input_ids)]
    common = _common_length(ids, input_ids)
    if common < len(ids):
        logger.warning(
            "the tokens of a prompt alone and before its completion differ from %r on: the model generates after other "
            "tokens than it was trained after; where plain prompts end with a space, move it to the completions",
            tokenizer.decode(ids[common:]),
        )


def supervised_token_count(dataset: Dataset) -> int:
    """Return the number of tokens with a label in a tokenised data set: those that one epoch takes the loss on."""
    return sum(label != IGNORED for labels in dataset["labels"] for label in labels)


def format_sample(tokenized_row: Row, tokenizer, max_chars: int = 600) -> str:
    """Return a tokenised row as text for the terminal, with what is trained on in ``[[`` and ``]]``.

    A stretch longer than ``max_chars`` is shortened in its middle; control characters are shown as escapes.
    """
    parts = []
    for supervised, ids in _stretches(tokenized_row["input_ids"], tokenized_row["labels"]):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if len(text) > max_chars:
            text = f"{text[: max_chars // 2]} ... {text[-(max_chars // 2) :]}"
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        parts.append(f"[[{text}]]" if supervised else text)
    return "".join(parts)


def _stretches(input_ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    for supervised, pairs in itertools.groupby(zip(input_ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        yield supervised, [token for token, _ in pairs]


def _render_spans(example: Row, tokenizer, text_field: str) -> tuple[str, list[tuple[str, str]], bool]:
    """Return the text of an example, what is trained on, and whether the chat template wrote the text.

    What is trained on is a list of (before, until): the text up to where a part begins, and up to where it ends.
    """
    if "messages" in example:
        return *_assistant_turns(example["messages"], tokenizer), True
    if "prompt" not in example:
        return example[text_field], [("", example[text_field])], False
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        return prompt + completion, [(prompt, prompt + completion)], False
    text = _render(prompt + completion, tokenizer)
    return text, [(_render(prompt, tokenizer, generation=True), text)], True


def _assistant_turns(messages: list[Message], tokenizer) -> tuple[str, list[tuple[str, str]]]:
    text = _render(messages, tokenizer)
    spans = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant" or n == 0:  # before the first message, templates have no header to render
            continue
        before = _render(messages[:n], tokenizer, generation=True)
        until = text if n == len(messages) - 1 else _render(messages[: n + 1], tokenizer)
        spans.append((before, _as_earlier_turn(message, text, before, until)))
    return text, spans


def _as_earlier_turn(message: Message, text: str, before: str, until: str) -> str:
    """Return ``until`` as the beginning of ``text`` that ends with the same turn.

    Some templates write more around a turn when it is the last one: Qwen 3 an empty thought before it, Phi 3 an end of
    text after it. So the turn is as much of what follows ``before`` in ``text`` as occurs in its rendering as last.
    """
    if text.startswith(until):
        return until
    start = _common_length(before, text)
    turn = until[_common_length(before, until) :]
    lengths = range(1, len(turn) + 1)
    length = bisect.bisect_left(lengths, True, key=lambda n: text[start : start + n] not in turn)
    found = text[start : start + length]
    if any(word not in found for word in message["content"].split()[-1:]):
        raise UserError(
            "the chat template rewrites an assistant turn once more messages follow, so its tokens cannot be told "
            f"apart: {_shortened(message['content'])!r}; give such data as prompt and completion"
        )
    return text[: start + length]


def _render(messages: list[Message], tokenizer, generation: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the data holds messages but the tokenizer has no chat template; use an instruct model's tokenizer, "
            "set chat_template_path, or give plain prompt and completion"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        opening = _shortened(messages[0]["content"])
        raise UserError(f"the chat template refuses the messages that begin {opening!r}: {error}") from None


def _encode(tokenizer, text: str, templated: bool) -> list[int]:
    """Tokenise; a chat template has written its own special tokens."""
    return tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]


def _common_length(a: Sequence, b: Sequence) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "..."
