"""Files: names inside a run folder, reading and writing them whole, and free disk space."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

from .errors import UserError

RESULT = "result.json"
JOURNAL = "answers.jsonl"
ALPACA_OUTPUTS = "alpaca_outputs.json"
TRAINING = "training.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LAST = "last"
SETTINGS = "settings.json"
TABLE = "table.md"
COMPARISON = "comparison.json"
# Of a study: folders, and what marks a run as finished.
BASE = "base"
PREPARED = "prepared"
RUNS = "runs"
RESULTS = "results"
RUN = "run.json"
LOG = "log.txt"
LOCK = "study.lock"
SUMMARY = "summary-{}.json"  # of the study of this name; several may share a folder
STUDY_TABLE = "table-{}.md"
# Of a search.
SEARCH = "search.json"
WINNER = "winner.yaml"


def is_there(name: str) -> bool:
    """Whether a file or folder of this name exists; a text that cannot be a name is none."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return False


def holds_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` is an adapter folder."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def check_free_space(folder: str | Path, need_bytes: float, remedy: str) -> None:
    """Refuse what the disk of ``folder`` (which need not exist yet) cannot take; ``remedy`` says what to do."""
    place = Path(folder).absolute()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if free < need_bytes:
        raise UserError(
            f"no disk space: {str(folder)!r} needs about {need_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"{remedy}"
        )


def read_text(file: Path) -> str:
    """Text of a file, which may be gzipped (``.gz``)."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as text:
        return text.read()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all (temporary file beside it, then renamed); missing folders are made."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another path") from error
