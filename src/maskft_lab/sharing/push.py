"""Put an adapter or a merged model on the hub: the files that loading it needs, and its card, in one commit."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from maskft.adapter.mask_set import read_coded, read_config
from maskft.tuner.card import adapter_card, hub_name, may_write
from maskft_base import files
from maskft_base.errors import UserError, first_line

from .card import score_lines

# Whatever else lies in a folder (checkpoints, records, logs, what somebody put there) stays where it is.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
)
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_OF_MODEL = ("config.json", "generation_config.json", files.CARD, *_WEIGHTS, *_TOKENIZER)


def contents_of(folder: str | Path, repository: str, base: str | None = None) -> dict[str, str | bytes]:
    """What is uploaded of a folder: name there -> the file's path, or the content where it names base and repository.

    Args:
        folder: Adapter folder, or a model that ``maskft merge`` has written.
        repository: Name on the hub, ``owner/name``.
        base: Of an adapter: the base's name on the hub. Default: the one the adapter gives.

    Raises:
        UserError: If the folder is neither, holds a link that leads out of it, or names a base that is on no hub.
    """
    folder = Path(folder)
    if files.holds_adapter(folder):
        return _found(folder, (files.ADAPTER_WEIGHTS, *_TOKENIZER)) | _texts(folder, repository, base)
    if not (folder / "config.json").is_file() or not (folder / files.CARD).is_file():
        raise UserError(f"{str(folder)!r} is neither an adapter folder nor a model that maskft merge has written")
    if base is not None:
        raise UserError(f"{str(folder)!r} is a merged model, which needs no base; drop --base")
    return _found(folder, _OF_MODEL)


def push(contents: dict[str, str | bytes], repository: str, is_private: bool = True) -> str:
    """Upload in one commit with the account of ``hf auth login`` or HF_TOKEN; returns the commit's address.

    Raises:
        UserError: If there is no account, or no hub, or it does not take the files.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=is_private, exist_ok=True)
        adding = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return str(api.create_commit(repository, adding, commit_message="Upload with maskft").commit_url)
    except LocalTokenNotFoundError as error:
        raise UserError("there is no account to push with: run hf auth login, or set HF_TOKEN") from error
    except Exception as error:  # of huggingface_hub, or of the HTTP library that its version uses
        raise UserError(f"the hub does not take {repository!r}: {first_line(error)}") from error


def _texts(folder: Path, repository: str, base: str | None) -> dict[str, str | bytes]:
    """Configuration and card of an adapter, which name the base and the repository as the hub does."""
    read_coded(folder)  # checks it
    config = read_config(folder)
    named = base or config.base_model_name_or_path
    if named != files.EMBEDDED_MODEL and hub_name(named) is None:
        raise UserError(
            f"the adapter's base is {named!r}, which is not on the hub; push that model, then pass --base owner/name"
        )
    written = files.read_json(folder / files.ADAPTER_CONFIG) | {"base_model_name_or_path": named}
    config = config.model_copy(update={"base_model_name_or_path": named})
    if may_write(folder):
        card = adapter_card(folder, config, repository, list(score_lines(folder, config)))
    else:
        card = files.own_file(folder, files.CARD).read_text(encoding="utf-8")
    return {files.ADAPTER_CONFIG: json.dumps(written, indent=2).encode() + b"\n", files.CARD: card.encode()}


def _found(folder: Path, patterns: tuple[str, ...]) -> dict[str, str | bytes]:
    names = filter_repo_objects(sorted(file.name for file in folder.iterdir()), allow_patterns=list(patterns))
    return {name: str(files.own_file(folder, name)) for name in names}
