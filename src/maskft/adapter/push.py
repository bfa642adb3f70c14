"""Put an adapter or a merged model on the hub: what is needed to load it, and its card, in one commit."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from maskft_base import files
from maskft_base.errors import UserError, first_line

from ..models import EMBEDDED_MODEL
from ..tuner.card import hub_name, may_write
from .card import adapter_card
from .mask_set import read_coded, read_config

# A training's folder also holds checkpoints, records and logs.
_TOKENIZER = r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*"
_OF_ADAPTER = re.compile(rf"{re.escape(files.ADAPTER_WEIGHTS)}|{_TOKENIZER}")
_OF_MODEL = re.compile(rf"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|{_TOKENIZER}")


def push(folder: str | Path, repository: str, base: str | None = None, private: bool = False) -> str:
    """Upload a folder; the account is that of ``hf auth login`` or of the variable HF_TOKEN.

    Args:
        folder: Adapter folder, or a model that ``maskft merge`` has written.
        repository: Name on the hub, ``owner/name``; the repository is made if it is not there.
        base: Of an adapter: the base's name on the hub. Default: the one the adapter gives.
        private: Whether a repository that is made is private.

    Returns:
        The address of the commit.

    Raises:
        UserError: If the folder is neither, names a base that nobody else has, or the hub refuses it.
    """
    folder, api = Path(folder), HfApi()
    if files.holds_adapter(folder):
        contents = _adapter(folder, repository, base, api)
    elif (folder / "config.json").is_file() and (folder / files.CARD).is_file():
        if base is not None:
            raise UserError(f"{str(folder)!r} is a merged model, which needs no base; drop --base")
        contents = _matching(folder, _OF_MODEL) | {files.CARD: str(folder / files.CARD)}
    else:
        raise UserError(f"{str(folder)!r} is neither an adapter folder nor a model that maskft merge has written")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        adding = [CommitOperationAdd(name, content) for name, content in contents.items()]

        return str(api.create_commit(repository, adding, commit_message="Upload with maskft").commit_url)
    except LocalTokenNotFoundError as error:
        raise UserError("there is no account to push with: run hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"the hub does not take {repository!r}: {first_line(error)}") from error


def _adapter(folder: Path, repository: str, base: str | None, api: HfApi) -> dict[str, str | bytes]:
    """Contents by their names there; configuration and card name the base and the repository as the hub does."""
    read_coded(folder)  # checks it
    named = base or read_config(folder).base_model_name_or_path
    if named != EMBEDDED_MODEL and hub_name(named) is None:
        raise UserError(
            f"the adapter's base is {named!r}, which is on no hub; push that model, and name it: --base owner/name"
        )
    config = files.read_json(folder / files.ADAPTER_CONFIG)
    config["base_model_name_or_path"] = named
    card = (
        adapter_card(folder, named, repository, _licence(named, api))
        if may_write(folder)
        else (folder / files.CARD).read_text(encoding="utf-8")
    )
    texts = {files.ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n", files.CARD: card}
    return _matching(folder, _OF_ADAPTER) | {name: text.encode() for name, text in texts.items()}


def _licence(base: str, api: HfApi) -> str | None:
    """The licence that the base's card on the hub names; None where it names none, or is not ours to read."""
    if hub_name(base) is None:
        return None
    try:
        card = api.model_info(base).card_data
    except HfHubHTTPError:
        return None
    licence = None if card is None else card.get("license")
    return licence if isinstance(licence, str) else None


def _matching(folder: Path, names: re.Pattern[str]) -> dict[str, str | bytes]:
    return {file.name: str(file) for file in sorted(folder.iterdir()) if file.is_file() and names.fullmatch(file.name)}
