"""What data is, wherever it lies: names that change with the content of the files, and with nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .arguments import DATA_NAMES, TEMPLATE
from .contamination import set_names, test_set_files
from .loading import local_files, split_of
from .mixtures import parse_mixture

# Options of `maskft train` and `maskft evaluate` that name a file, or a folder of files, as it is.
_FILES = (TEMPLATE, "alpaca_prompts", "alpaca_outputs", "reference_outputs", "length_control", "include_path")

# A weight file is known by this many blocks of this many bytes, spread over it, so that every matrix has some.
_NUM_BLOCKS, _BLOCK_BYTES = 1024, 4096
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# What else in a model's folder decides what it computes and how text becomes tokens.
_OF_MODEL = ("config.json", "generation_config.json", "*.py", "*.jinja")
_OF_TOKENIZER = ("token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def model_identity(name: str) -> str:
    """A hub name as it is; a local folder by configuration, tokenizer, chat template and samples of its weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    patterns = (*_WEIGHTS, *_OF_MODEL, *_OF_TOKENIZER)
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        content = file_digest(file, is_sampled=any(map(file.match, _WEIGHTS)))
        digest.update(f"{file.name} {file.stat().st_size} {content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def data_identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options with every data file named by its content: a moved file is the same, an edited one is not.

    Args:
        options: Options of ``maskft train`` or ``maskft evaluate``; those that are not about data stay as they are.
    """
    out = {key: value for key, value in options.items() if key != "data_dir"}
    splits = (options.get("dataset_train_split") or "train", options.get("dataset_eval_split"))
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
    for key in _FILES:
        if isinstance(out.get(key), str):
            files = [Path(out[key]).expanduser()]
            if files[0].is_dir():
                # What lm-eval reads there: tasks and their functions, which leave compiled files beside them.
                files = sorted(path for ending in ("yaml", "yml", "py") for path in files[0].rglob(f"*.{ending}"))
            out[key] = _of_files(files) or out[key]
    return out


def _set_identity(name: str, data_dir: str | None, split: str | None) -> str:
    parts, mixture = [], parse_mixture(name)
    for part in mixture:
        files = local_files(part.name, data_dir, split_of(part.name, split, len(mixture) > 1))
        text = _of_files(files) or part.name
        parts.append(text if part.amount is None else f"{text}:{part.amount}")
    return ",".join(parts)


def _of_files(files: Sequence[Path]) -> str | None:
    digests = [file_digest(file) for file in files if file.is_file()]
    return f"sha256:{'+'.join(digests)}" if digests else None


def file_digest(file: Path, is_sampled: bool = False) -> str:
    """sha256 of a file, or of blocks spread over it where it is large; kept until the file is written to."""
    file = file.resolve()
    return _digest(str(file), file.stat().st_mtime_ns, is_sampled)


@lru_cache(maxsize=16384)
def _digest(file: str, mtime_ns: int, is_sampled: bool) -> str:
    digest, size = hashlib.sha256(), Path(file).stat().st_size
    with open(file, "rb") as stream:
        if is_sampled and size > _NUM_BLOCKS * _BLOCK_BYTES:
            for number in range(_NUM_BLOCKS):
                stream.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
        else:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
