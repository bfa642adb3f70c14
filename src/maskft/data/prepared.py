"""Rows as training takes them: read, split, tokenised, and kept for later runs on the same data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_from_disk

from maskft_common import processes
from maskft_common.errors import UserError
from maskft_common.files import digest, digest_file, digest_now, read_json, whole_folder

from .arguments import DATA_NAMES, TEMPLATE, DataArguments
from .mixtures import parse_mixture
from .registry import TRAINING_SETS
from .sources import local_file, split_of
from .splits import load_splits
from .tokenizing import tokenize_dataset, tokenizer_rules

# Options of `maskft train` and `maskft evaluate` that name a file, or a folder of files, as it is.
_FILES = (TEMPLATE, "reference_outputs", "alpaca_annotator", "include_path")

REPORT = "report.json"
_SETS = ("train", "heldout")


class Prepared(NamedTuple):
    """What a run trains on and measures.

    Attributes:
        train: Training rows as token ids and labels; those without a supervised token are left out.
        heldout: Held-out rows as token ids and labels, likewise.
        report: Counts of rows read, kept and left out: ``text`` and, as values, ``counts``.
    """

    train: Dataset
    heldout: Dataset
    report: dict[str, Any]


def prepare(
    args: DataArguments,
    tokenizer,
    text_field: str = "text",
    max_length: int | None = None,
    completion_only_loss: bool = True,
    num_proc: int | None = None,
) -> Prepared:
    """Read, split and tokenise; or load what an earlier run left in ``args.prepared_data_dir``.

    What is kept is named by all that decides it: these arguments, the content of the files (a hub data set by its
    name), the tokenizer with its chat template, and the code of this package. Several processes may ask at once.

    Args:
        args: The data part of the recipe.
        tokenizer: A transformers tokenizer.
        text_field: Name of the column that holds plain text.
        max_length: Tokens to keep of a row.
        completion_only_loss: False takes the loss on every token.
        num_proc: Processes that tokenise; None: this one.
    """
    tokens = {"max_length": max_length, "completion_only_loss": completion_only_loss}
    how = {**tokens, "num_proc": num_proc}
    if args.prepared_data_dir is None:
        return _prepare(args, tokenizer, text_field, how)
    options = {k: v for k, v in asdict(args).items() if k not in ("prepared_data_dir", "prepare_only")}
    code = [digest_file(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    rules = [tokenizer_rules(tokenizer), tokenizer.chat_template]
    decides = {"data": data_identity(options), "tokenizer": rules, "code": code, "text_field": text_field, **tokens}
    name = digest(decides)[:16]
    folder = Path(args.prepared_data_dir).expanduser() / name
    processes.decided_by_main(lambda: _keep(folder, args, tokenizer, text_field, how))
    # On another machine, without a shared disk, the main process's is not there.
    _keep(folder, args, tokenizer, text_field, how)
    report = _checked_report(folder)
    return Prepared(*(load_from_disk(folder / each) for each in _SETS), report=report)


def _prepare(args: DataArguments, tokenizer, text_field: str, how: Mapping[str, Any]) -> Prepared:
    *sets, report = load_splits(args, args.split_seed, tokenizer, text_field)
    train, heldout = (tokenize_dataset(rows, tokenizer, **how) for rows in sets)
    return Prepared(train, heldout, {"text": str(report), "counts": asdict(report)})


def _keep(folder: Path, args: DataArguments, tokenizer, text_field: str, how: Mapping[str, Any]) -> None:
    """Write the folder whole, unless it is there."""
    if folder.is_dir():
        return
    prepared = _prepare(args, tokenizer, text_field, how)
    try:
        with whole_folder(folder) as partial:
            for name in _SETS:
                getattr(prepared, name).save_to_disk(partial / name)
            sums = {str(file.relative_to(partial)): digest_now(file) for file in partial.rglob("*") if file.is_file()}
            (partial / REPORT).write_text(json.dumps(prepared.report | {"sha256": sums}))
    except OSError:
        if not folder.is_dir():  # else another process was first, and its folder says the same
            raise


def _checked_report(folder: Path) -> dict[str, Any]:
    """The report of prepared rows, whose files are as they were written.

    Raises:
        UserError: If one is not.
    """
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    for name, sha256 in report.pop("sha256", {REPORT: ""}).items():
        if not (folder / name).is_file() or digest_now(folder / name) != sha256:
            raise UserError(
                f"prepared data {str(folder)!r} is damaged: {name} does not match its checksum; delete that "
                "folder to prepare the data again"
            )
    return report


# What decides the rows


def data_identity(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with every data file named by its content: a moved file is the same, an edited one is not.

    Args:
        options: Options of ``maskft train`` or ``maskft evaluate``; those that are not about data stay as they are.
    """
    data_dir = options.get("data_dir")
    out = {key: value for key, value in options.items() if key != "data_dir"}
    splits = (options.get("dataset_train_split") or "train", options.get("dataset_eval_split"))
    for key, split in zip(DATA_NAMES, splits, strict=True):
        if isinstance(out.get(key), str):
            out[key] = _mixture_identity(out[key], data_dir, split)
    if isinstance(options.get("dataset_name"), str) and splits[1]:
        # Without a set of its own the held-out data is another split of this one.
        out["dataset_eval_split"] = f"{splits[1]} of {_mixture_identity(options['dataset_name'], data_dir, splits[1])}"
    for key in _FILES:
        if isinstance(out.get(key), str):
            files = [Path(out[key]).expanduser()]
            if files[0].is_dir():
                # What lm-eval reads there: tasks and their functions, which leave compiled files beside them.
                files = sorted(path for ending in ("yaml", "yml", "py") for path in files[0].rglob(f"*.{ending}"))
            out[key] = _of_files(files) or out[key]
    return out


def _mixture_identity(name: str, data_dir: str | None, split: str | None) -> str:
    parts = []
    for part in parse_mixture(name):
        file = local_file(part.name, data_dir, split_of(part.name, split))
        text = _of_files([file] if file else []) or part.name
        if text != part.name and part.name in TRAINING_SETS and TRAINING_SETS[part.name].source:
            text = f"{part.name} of {text}"  # the name decides which rows of the file are taken
        parts.append(text if part.amount is None else f"{text}:{part.amount}")
    return ",".join(parts)


def _of_files(files: Sequence[Path]) -> str | None:
    digests = [digest_file(file) for file in files if file.is_file()]
    return f"sha256:{'+'.join(digests)}" if digests else None
