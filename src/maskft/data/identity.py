"""What data is, wherever it lies: names that change with the content of the files, and with nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data_arguments import DATA_NAMES, TEMPLATE
from .contamination import set_names, test_set_files
from .loading import local_files
from .mixtures import parse_mixture


def data_identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options with every data file named by its content: a moved file is the same, an edited one is not.

    Args:
        options: Options of ``maskft train`` or ``maskft evaluate``; those that are not about data stay as they are.
    """
    out = {key: value for key, value in options.items() if key != "data_dir"}
    splits = (options.get("dataset_train_split") or "train", options.get("dataset_eval_split") or "test")
    for key, split in zip(DATA_NAMES, splits, strict=True):
        if isinstance(out.get(key), str):
            out[key] = _set_identity(out[key], options.get("data_dir"), split)
    if isinstance(options.get("dataset_name"), str) and options.get("dataset_eval_split"):
        # Without a set of its own the held-out data is another split of this one.
        rows = _set_identity(options["dataset_name"], options.get("data_dir"), splits[1])
        out["dataset_eval_split"] = f"{splits[1]} of {rows}"
    if isinstance(out.get("contamination_sets"), str):
        named = {name: test_set_files(name, options.get("data_dir")) for name in set_names(out["contamination_sets"])}
        out["contamination_sets"] = ",".join(_of_files(files) or name for name, files in named.items())
    if isinstance(out.get(TEMPLATE), str) and Path(out[TEMPLATE]).expanduser().is_file():
        out[TEMPLATE] = f"sha256:{file_digest(Path(out[TEMPLATE]).expanduser())}"
    return out


def _set_identity(name: str, data_dir: str | None, split: str) -> str:
    parts = []
    for part in parse_mixture(name):
        text = _of_files(local_files(part.name, data_dir, split)) or part.name
        parts.append(text if part.amount is None else f"{text}:{part.amount}")
    return ",".join(parts)


def _of_files(files: Sequence[Path]) -> str | None:
    digests = [file_digest(file) for file in files if file.is_file()]
    return f"sha256:{'+'.join(digests)}" if digests else None


def file_digest(file: Path, sampled_bytes: int | None = None) -> str:
    """sha256 of a file, or of ``sampled_bytes`` at each of its ends; kept until the file is written to."""
    file = file.resolve()
    return _digest(str(file), file.stat().st_mtime_ns, sampled_bytes)


@lru_cache(maxsize=4096)
def _digest(file: str, mtime_ns: int, sampled_bytes: int | None) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        if sampled_bytes is not None:
            digest.update(stream.read(sampled_bytes))
            stream.seek(max(stream.tell(), Path(file).stat().st_size - sampled_bytes))
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
