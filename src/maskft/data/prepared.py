"""Rows as training takes them: read, split, tokenised, and kept for later runs on the same data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_from_disk

from maskft_common import processes
from maskft_common.errors import UserError, first_line
from maskft_common.files import (
    digest,
    digest_file,
    digest_now,
    expand_user,
    own_file,
    read_json,
    whole_folder,
)
from maskft_common.schema import FileModel, read_model

from .arguments import DATA_NAMES, KL_DATA, TEMPLATE, DataArguments
from .mixtures import parse_mixture
from .registry import TRAINING_SETS
from .sources import local_file, split_of
from .splits import SplitReport, clusters_of, load_splits
from .tokenizing import tokenize_dataset, tokenizer_rules

# Options of `maskft train` and `maskft evaluate` that name a file, or a folder of files, as it is.
_FILES = (TEMPLATE, "reference_outputs", "alpaca_annotator", "include_path")

REPORT = "report.json"
_TRAIN = "train"
_HELDOUT = "heldout"
_DELETE = "delete that folder to prepare the data again"


class Prepared(NamedTuple):
    """The rows that a run trains on and measures.

    Attributes:
        train: Training rows as token ids and labels; those without a supervised token are left out.
        heldout: Held-out rows as token ids and labels, likewise.
        report: Counts of rows read, kept and left out: ``text`` for people and, as values, ``counts``.
    """

    train: Dataset
    heldout: Dataset
    report: dict[str, Any]


class _Report(FileModel):
    """The file ``report.json`` beside prepared rows.

    Attributes:
        counts: Of rows.
        sha256: Of every other file in the folder, by its name.
    """

    counts: SplitReport
    sha256: dict[str, str]


def prepare(
    args: DataArguments,
    tokenizer,
    text_field: str = "text",
    max_length: int | None = None,
    completion_only_loss: bool = True,
    num_proc: int | None = None,
) -> Prepared:
    """Read, split and tokenise; or load the rows that an earlier run left in ``args.prepared_data_dir``.

    Rows are kept under a digest of all that decides them: these arguments, the content of the files (a hub data set by
    its name), the tokenizer with its chat template, and the code of this package. ``datasets`` would keep the result of
    each step by itself, but takes neither a file's content nor our code into account, and finds no flipped bit. Several
    processes may ask at once.

    Args:
        args: The data part of the recipe.
        tokenizer: A transformers tokenizer.
        text_field: Name of the column that holds plain text.
        max_length: Tokens to keep of a row.
        completion_only_loss: False takes the loss on every token.
        num_proc: Processes that tokenise; None: this one.

    Raises:
        UserError: If the data cannot be read or leave no row to train on, or kept rows are damaged.
    """
    tokens = {
        "max_length": max_length,
        "completion_only_loss": completion_only_loss,
    }

    def prepare_now() -> Prepared:
        splits = load_splits(
            args,
            args.split_seed,
            tokenizer,
            text_field,
        )
        train = tokenize_dataset(
            splits.train,
            tokenizer,
            **tokens,
            num_proc=num_proc,
        )
        heldout = tokenize_dataset(
            _with_clusters(splits.heldout),
            tokenizer,
            **tokens,
            num_proc=num_proc,
        )
        return Prepared(train, heldout, _as_dict(splits.report))

    if args.prepared_data_dir is None:
        return prepare_now()

    # Everything that decides the rows. The two options that are left out only say where they are kept, and that
    # nothing else is to be done.
    options = asdict(args)
    del options["prepared_data_dir"]
    del options["prepare_only"]
    code = sorted(Path(__file__).parent.glob("*.py"))
    decides = {
        "data": data_identity(options),
        "tokenizer": [tokenizer_rules(tokenizer), tokenizer.chat_template],
        "code": [digest_file(file) for file in code],
        "text_field": text_field,
        **tokens,
    }
    # 16 of 64 digits, to keep the path short.
    name = digest(decides)[:16]
    folder = expand_user(args.prepared_data_dir) / name

    # Whole if it exists, as _write renames it: its content is not compared before it is read.
    def keep() -> None:
        if not folder.is_dir():
            _write(folder, prepare_now())

    processes.decided_by_main(keep)
    # Again in every process: without a shared disk, another machine does not have the main process's folder.
    keep()
    return _read(folder)


def _with_clusters(heldout: Dataset) -> Dataset:
    """Return held-out rows with a ``cluster_id`` if some share a prompt: the verdict counts these as one."""
    if "cluster_id" in heldout.column_names:
        return heldout
    clusters = clusters_of(heldout)
    if clusters[0] is None:
        return heldout
    return heldout.add_column("cluster_id", clusters)


def _write(folder: Path, prepared: Prepared) -> None:
    """Write rows, their counts and checksums into a new folder, whole or not at all."""
    try:
        with whole_folder(folder) as partial:
            prepared.train.save_to_disk(partial / _TRAIN)
            prepared.heldout.save_to_disk(partial / _HELDOUT)

            # All files that were written so far; the report itself is checked by its structure.
            sha256 = {}
            for file in partial.rglob("*"):
                if file.is_file():
                    name = str(file.relative_to(partial))
                    sha256[name] = digest_now(file)
            content = {
                "counts": prepared.report["counts"],
                "sha256": sha256,
            }
            (partial / REPORT).write_text(json.dumps(content))
    except OSError:
        # Another process may have been first, and its folder holds the same rows.
        if not folder.is_dir():
            raise


def _read(folder: Path) -> Prepared:
    """Read prepared rows.

    Raises:
        UserError: If a file is not as it was written.
    """
    file_of_report = folder / REPORT
    content = {}
    if file_of_report.is_file():
        content = read_json(file_of_report)
    # Without the file, the empty content raises with the remedy.
    report = read_model(_Report, content, file_of_report, _DELETE)

    for name, sha256 in report.sha256.items():
        # The name comes from a file, and must not lead out of the folder.
        file = own_file(folder, name)
        if not file.is_file() or digest_now(file) != sha256:
            raise UserError(f"prepared data {str(folder)!r} is damaged: {name} does not match its checksum; {_DELETE}")

    try:
        train = load_from_disk(folder / _TRAIN)
        heldout = load_from_disk(folder / _HELDOUT)
    except Exception as error:
        # datasets raises errors of many types for files of another structure.
        raise UserError(f"prepared data {str(folder)!r} cannot be read ({first_line(error)}); {_DELETE}") from error
    return Prepared(train, heldout, _as_dict(report.counts))


def _as_dict(report: SplitReport) -> dict[str, Any]:
    return {
        "text": str(report),
        "counts": asdict(report),
    }


# The identity of the rows


def data_identity(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with every data file named by its content: a moved file is the same, an edited one is not.

    Args:
        options: Options of ``maskft train`` or ``maskft evaluate``; those that are not about data stay as they are.
    """
    data_dir = options.get("data_dir")
    train_split = options.get("dataset_train_split") or "train"
    eval_split = options.get("dataset_eval_split")
    # The folder itself is left out: the files in it are named by their content below. Options are of two commands, so
    # that each may be missing.
    out = {key: value for key, value in options.items() if key != "data_dir"}

    # Data sets and mixtures of them.
    for key, split in zip(DATA_NAMES, (train_split, eval_split), strict=True):
        name = out.get(key)
        if isinstance(name, str):
            out[key] = _mixture_identity(name, data_dir, split)
    training_data = options.get("dataset_name")
    if isinstance(training_data, str) and eval_split:
        # If no other set is held out, another split of this one is.
        identity = _mixture_identity(training_data, data_dir, eval_split)
        out["dataset_eval_split"] = f"{eval_split} of {identity}"
    kl_data = out.get(KL_DATA)
    if isinstance(kl_data, str):
        out[KL_DATA] = _mixture_identity(kl_data, data_dir, "train")

    # Other files, such as a chat template.
    for key in _FILES:
        name = out.get(key)
        if isinstance(name, str):
            path = expand_user(name)
            # A name without a file, such as that of a hub model, stays as it is.
            out[key] = _identity_of_path(path) or name
    return out


def _identity_of_path(path: Path) -> str | None:
    if not path.is_dir():
        return _digest_files([path])

    # Only the files that lm-eval reads there, tasks and their functions: Python leaves compiled files beside them.
    files: list[Path] = []
    for ending in ("yaml", "yml", "py"):
        files += path.rglob(f"*.{ending}")
    return _digest_files(sorted(files))


def _mixture_identity(
    name: str,
    data_dir: str | None,
    split: str | None,
) -> str:
    """A mixture as text, with the content of each file in place of its name; hub data sets keep theirs."""
    parts = []
    for part in parse_mixture(name):
        # None asks for held-out data, whose split depends on the set.
        split_of_part = split_of(part.name, split)
        file = local_file(part.name, data_dir, split_of_part)
        content = None
        if file is not None:
            content = _digest_files([file])

        text = content or part.name
        known = TRAINING_SETS.get(part.name)
        if content and known and known.source:
            # The name decides which rows of the file are taken.
            text = f"{part.name} of {text}"
        if part.amount is not None:
            text = f"{text}:{part.amount}"
        parts.append(text)
    return ",".join(parts)


def _digest_files(files: Sequence[Path]) -> str | None:
    """Digest of the content of files; None: none of them exists."""
    # Of the content alone: a file that was renamed holds the same rows.
    digests = [digest_file(file) for file in files if file.is_file()]
    if not digests:
        return None
    return f"sha256:{'+'.join(digests)}"
