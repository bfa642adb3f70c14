"""The items of the benchmarks: files in their published formats, or the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from maskft.data.registry import MATH_SUBJECTS
from maskft.data.sources import read_file
from maskft_base.errors import UserError, first_line
from maskft_base.files import parse_json

ENDINGS = r"\.(jsonl|jsonl\.gz|json|json\.gz|parquet)"


@dataclass(frozen=True)
class Source:
    """Where the items of a benchmark come from.

    Args:
        files: Regular expression of file names without ending, any case; ``{split}`` stands for test or train.
        fields: Field -> type that every row must have.
        hub: Name on the hub.
        configs: Configurations of the hub's data set, all of which are joined.
        splits: Our split -> the hub's; a benchmark without ``train`` has no items but the test's.
        folders: Pattern of folders that hold one JSON file per item, below the data folder.
        flaw: What is wrong with a row that has the fields, or None; what lm-eval would end on with a traceback.
    """

    files: str
    fields: Mapping[str, type]
    hub: str
    configs: tuple[str | None, ...] = (None,)
    splits: Mapping[str, str] | None = None
    folders: str | None = None
    flaw: Callable[[Mapping], str | None] = lambda row: None


def _no_boxed_answer(row: Mapping) -> str | None:
    return None if r"\boxed" in row["solution"] else r"solution has no \boxed{answer}"


def _arguments_missing(row: Mapping) -> str | None:
    kinds, arguments = len(row["instruction_id_list"]), len(row["kwargs"])
    return None if kinds == arguments else f"{kinds} entries in instruction_id_list and {arguments} in kwargs"


SOURCES = {
    "gsm8k": Source(
        files=r"gsm8k.*{split}.*",
        fields={"question": str, "answer": str},
        hub="openai/gsm8k",
        configs=("main",),
        splits={"test": "test", "train": "train"},
    ),
    "minerva_math": Source(
        files=r"(minerva[-_]|hendrycks[-_])?math[-_]?(500)?[-_]?{split}.*",
        fields={"problem": str, "solution": str},
        hub="EleutherAI/hendrycks_math",
        configs=MATH_SUBJECTS,
        splits={"test": "test", "train": "train"},
        folders="MATH/{split}/*/*.json",
        flaw=_no_boxed_answer,
    ),
    "humaneval": Source(
        files=r"human[-_]?eval",
        fields={"task_id": str, "prompt": str, "entry_point": str, "test": str},
        hub="openai/openai_humaneval",
        splits={"test": "test"},
    ),
    "humaneval_plus": Source(
        files=r"human[-_]?eval[-_]?plus.*",
        fields={"task_id": str, "prompt": str, "entry_point": str, "test": str},
        hub="evalplus/humanevalplus",
        splits={"test": "test"},
    ),
    "ifeval": Source(
        files=r"if[-_]?eval.*|input_data",
        fields={"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list},
        hub="google/IFEval",
        splits={"test": "train"},
        flaw=_arguments_missing,
    ),
}


def load_docs(task: str, data_dir: str | Path | None, split: str = "test") -> datasets.Dataset:
    """The items of a benchmark, checked.

    Args:
        task: Key of ``SOURCES``.
        data_dir: Folder that holds the published files, searched with all its folders; None: the hub.
        split: ``test`` or ``train``.

    Raises:
        UserError: If there is no such file, several, or a row lacks a field.
    """
    source = SOURCES[task]
    if split not in source.splits:
        raise UserError(f"task {task} has no {split} split, only test items")
    if data_dir is None:
        return _from_hub(source, split)
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data_dir {str(data_dir)!r} is not a folder")
    problems = _problems(task, folder, split)
    file = None if problems else find_file(task, folder, split)
    rows = []
    for where, row in ((path, _read_object(path)) for path in problems) if problems else read_file(file):
        _check(row, source, str(where) if problems else f"{file}: {where}")
        rows.append({field: row[field] for field in source.fields})  # others may not fit into one table
    if not rows:
        raise UserError(f"{file} has no rows")
    return datasets.Dataset.from_list(rows)


def code_with_tests(row: Mapping, completion: str) -> str:
    """The program that scores an answer to an item of HumanEval, put together as its own scorer does it."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def find_file(task: str, folder: Path, split: str = "test") -> Path:
    """The one file of a benchmark in a folder and its folders.

    Raises:
        UserError: If there is none, or several.
    """
    source, found = SOURCES[task], _tables(task, folder, split)
    if not found:
        raise UserError(
            f"data_dir {str(folder)!r} holds no {split} file of {task}, a table of {', '.join(source.fields)}; its "
            f"name must match {source.files.format(split=split)!r} (.jsonl, .jsonl.gz, .json, .parquet)"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"data_dir {str(folder)!r} holds several {split} files of {task} ({names}); keep one")
    return found[0]


def benchmark_files(task: str, folder: Path, splits: Sequence[str] | None = None) -> list[Path]:
    """Every file of a benchmark in a folder, of all splits or some; none for tasks that are not read from files."""
    has = SOURCES[task].splits if task in SOURCES else ()
    splits = [split for split in has if splits is None or split in splits]
    return [path for split in splits for path in (*_tables(task, folder, split), *_problems(task, folder, split))]


def _tables(task: str, folder: Path, split: str) -> list[Path]:
    pattern = re.compile(f"({SOURCES[task].files.format(split=split)}){ENDINGS}", re.IGNORECASE)
    return sorted(path for path in folder.rglob("*") if path.is_file() and pattern.fullmatch(path.name))


def _problems(task: str, folder: Path, split: str) -> list[Path]:
    pattern = SOURCES[task].folders
    return sorted(folder.rglob(pattern.format(split=split))) if pattern else []


def _read_object(path: Path):
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _check(row, source: Source, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object; expected the fields {', '.join(source.fields)}")
    for field, kind in source.fields.items():
        if field not in row:
            raise UserError(f"{where} has no field {field!r}; it has {', '.join(map(str, row))}")
        if not isinstance(row[field], kind):
            raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, not {kind.__name__}")
    if flaw := source.flaw(row):
        raise UserError(f"{where}: {flaw}; is it the published file?")


def _from_hub(source: Source, split: str) -> datasets.Dataset:
    try:
        parts = [datasets.load_dataset(source.hub, config, split=source.splits[split]) for config in source.configs]
    except Exception as error:  # many types: no network, no such name
        raise UserError(
            f"the hub did not give {source.hub!r} ({type(error).__name__}: {first_line(error)}); with the files on "
            "this machine, name their folder: --data_dir"
        ) from None
    return datasets.concatenate_datasets([part.select_columns(list(source.fields)) for part in parts])
