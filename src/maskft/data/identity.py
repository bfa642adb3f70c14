"""What data is, wherever it lies: names that change with the content of the files, and with nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import digest, digest_file
from .arguments import DATA_NAMES, TEMPLATE
from .contamination import set_names, test_set_files
from .loading import local_files, split_of
from .mixtures import parse_mixture

# Options of `maskft train` and `maskft evaluate` that name a file, or a folder of files, as it is.
_FILES = (TEMPLATE, "alpaca_prompts", "alpaca_outputs", "reference_outputs", "length_control", "include_path")

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# What else in a model's folder decides what it computes and how text becomes tokens.
_OF_MODEL = ("config.json", "generation_config.json", "*.py", "*.jinja")
_OF_TOKENIZER = ("token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def model_identity(name: str) -> str:
    """A hub name as it is; a local folder by configuration, tokenizer, chat template and samples of its weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    patterns = (*_WEIGHTS, *_OF_MODEL, *_OF_TOKENIZER)
    lines = []
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}):
        content = digest_file(file, is_sampled=any(map(file.match, _WEIGHTS)))
        lines.append(f"{file.name} {file.stat().st_size} {content}\n")
    return f"sha256:{digest(''.join(lines))}"


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
    digests = [digest_file(file) for file in files if file.is_file()]
    return f"sha256:{'+'.join(digests)}" if digests else None
