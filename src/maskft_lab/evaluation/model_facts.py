"""Digests that identify a model or an adapter, and facts that its folder holds about its training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from maskft.data.tokenizing import tokenizer_rules
from maskft.masks.mask_set import read_config
from maskft.masks.merge import one_line
from maskft.models import base_of, check_model_source, check_named_base
from maskft_common.errors import UserError
from maskft_common.files import digest, digest_tensors, expand_user, read_json
from maskft_common.layout import ADAPTER_CONFIG, TRAINING, holds_adapter, no_adapter

from .evaluation_arguments import NO_ADAPTER

# Fields of an adapter_config.json that change no output: where the base was, how it was trained, who wrote it.
_CHANGE_NO_OUTPUT_OF_ADAPTER = (
    "base_model_name_or_path",
    "base_quantisation",
    "inference_mode",
    "peft_version",
    "recipe",
    "revision",
)
# The same of a model's configuration, besides keys that begin with an underscore. The dtype is a setting of the
# evaluation.
_CHANGE_NO_OUTPUT_OF_MODEL = (
    "architectures",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
# Further keys that change no logits of a text: they are of training, of generation, or of shapes that are compared.
_CHANGE_NO_LOGITS = (
    "initializer_range",
    "use_cache",
    "vocab_size",
)
_ENDINGS_THAT_CHANGE_NO_LOGITS = ("_token_id", "dropout", "pdrop")
# GGUF files hold float32, JSON files float64: 1e-6 is 9.99999997e-07 in one of them.
_FLOAT32_TOLERANCE = 1e-6


# Digests


def model_fingerprint(model) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all weights."""
    labelled = []
    # By name, because the order of modules may differ between versions of transformers.
    for name, tensor in sorted(model.state_dict().items()):
        label = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        labelled.append((label, tensor))
    return digest_tensors(labelled)


def config_sha256(configuration: Mapping, tokenizer) -> str:
    """sha256 over the parts of a model's configuration and tokenizer that change outputs, without chat template."""
    # Not the chat template: a result has its hash for each task, since not every task uses it.
    content = {
        "configuration": _without_unused(configuration),
        **tokenizer_rules(tokenizer),
    }
    return digest(content)


def _without_unused(value: Any) -> Any:
    """A configuration without the keys that change no output, at every depth."""
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, each in value.items():
        # Keys may be numbers, such as those of id2label, until they are written as JSON.
        name = str(key)
        is_used = name not in _CHANGE_NO_OUTPUT_OF_MODEL and not name.startswith("_")
        if is_used:
            kept[name] = _without_unused(each)
    return kept


def differing_key(configuration: Any, other: Any) -> str | None:
    """The first key in which two models' configurations differ, such as ``rope_parameters.rope_theta``.

    Keys that change no logits of a text do not count.

    Args:
        configuration: Keys and values, as ``to_diff_dict`` of transformers gives them.
        other: Those of the other model.
    """
    first = _without_unused(configuration)
    second = _without_unused(other)
    # A dict keeps the order of the keys, which a set would not.
    for key in {**first, **second}:
        if key in _CHANGE_NO_LOGITS or key.endswith(_ENDINGS_THAT_CHANGE_NO_LOGITS):
            continue
        value = first.get(key)
        other_value = second.get(key)
        if isinstance(value, Mapping) and isinstance(other_value, Mapping):
            inner = differing_key(value, other_value)
            if inner is not None:
                return f"{key}.{inner}"
        elif isinstance(value, float) and isinstance(other_value, float):
            if not math.isclose(value, other_value, rel_tol=_FLOAT32_TOLERANCE):
                return key
        elif value != other_value:
            return key
    return None


def adapter_sha256(folder: str) -> str:
    """sha256 over an adapter's weights, and the parts of ``adapter_config.json`` that change outputs."""
    # Of the file and not of PEFT's object, whose defaults change from version to version.
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    used = {}
    for key, value in config.items():
        if key in _CHANGE_NO_OUTPUT_OF_ADAPTER:
            continue
        # PEFT writes sets, such as target_modules, in no fixed order.
        if isinstance(value, list):
            value = sorted(value, key=str)
        used[key] = value
    content = json.dumps(used, sort_keys=True).encode()

    # adapter_model.safetensors, or .bin of an older PEFT.
    for file in sorted(Path(folder).glob("adapter_model.*")):
        content += file.read_bytes()
    return digest(content)


# Folders


def base_and_revision(name: str | None, adapters: Sequence[str]) -> tuple[str, str | None]:
    """The base model of adapters, and its revision if they name one.

    Args:
        name: The base model by the user; None: the one that all adapters name.
        adapters: Folders, or ``none``.

    Raises:
        UserError: If a folder holds no adapter or one that cannot be measured, or the adapters belong to different
            models or revisions.
    """
    configs = {adapter: _peft_config(adapter) for adapter in adapters if adapter != NO_ADAPTER}
    for adapter, config in configs.items():
        # They put tokens of their own before each text, so that the logits of a loss are those of other tokens.
        if config.is_prompt_learning:
            raise UserError(
                f"adapter {adapter!r} puts virtual tokens before each text (a prompt or prefix): name adapters that "
                "change weights, such as masks and LoRA"
            )

    # Adapter -> the base that it names, found from the adapter's folder if it is a relative path.
    bases: dict[str, str | None] = {}
    for adapter, config in configs.items():
        base = config.base_model_name_or_path
        bases[adapter] = base_of(adapter, base) if base else None

    # None is one of them if an adapter names no base.
    distinct = set(bases.values())
    if name is None and len(distinct) == 1:
        [name] = distinct
        if name is not None:
            check_named_base(next(iter(bases)), name, "--model_name_or_path")
    if name is None and not bases:
        raise UserError("model_name_or_path is missing; name a model, or adapters with --adapter")
    if name is None:
        pairs = [f"{Path(adapter).name}: {base}" for adapter, base in bases.items()]
        raise UserError(f"the adapters do not name one base model ({', '.join(pairs)}); pass --model_name_or_path")
    check_model_source(name)

    # An adapter without revision is over the main one. If the user named another base, the adapters' revisions are not
    # of that.
    revisions: set[str] = set()
    for adapter, config in configs.items():
        if bases[adapter] == name:
            revisions.add(config.revision or "main")
    if len(revisions) > 1:
        raise UserError(f"the adapters belong to different revisions of {name!r}; evaluate them one by one")
    return name, next(iter(revisions), None)


def _peft_config(adapter: str) -> PeftConfig:
    if not holds_adapter(adapter):
        raise no_adapter(adapter)
    with one_line(adapter, "has no adapter_config.json that PEFT can read"):
        config = PeftConfig.from_pretrained(adapter)
    # A file of another program may hold any JSON value here.
    if not isinstance(config.base_model_name_or_path, str | None):
        raise UserError(f"{adapter!r}: base_model_name_or_path is {config.base_model_name_or_path!r}; write a name")
    return config


def facts_of(source: str) -> dict:
    """Method and seed of a model or an adapter, and the fingerprint of a mask, as its folder states them.

    Empty for a folder of another program, whose ``training.json``, if any, has another content.
    """
    kind = None
    if holds_adapter(source):
        # An enum of PEFT's own types, a text of others.
        peft_type = _peft_config(source).peft_type
        kind = str(getattr(peft_type, "value", peft_type))
    if kind == "MASK":
        config = read_config(source)
        return {
            "mask_fingerprint": config.mask_sha256,
            "method": config.recipe.get("method", "mask"),
            "seed": config.recipe.get("seed"),
        }

    content = None
    file = Path(source) / TRAINING
    if file.is_file():
        content = read_json(file)
    # Full fine-tuning and LoRA have their recipe in ``training.json``, masks in their adapter's configuration.
    recipe = None
    if isinstance(content, dict):
        recipe = content.get("recipe")

    facts = {}
    if kind is not None:
        facts["method"] = kind.lower()
    if isinstance(recipe, dict):
        facts["method"] = recipe.get("method")
        facts["seed"] = recipe.get("seed")
    return facts


def portable_name(name: str) -> str:
    """Name for a result file, which is shared: the last component of a folder, a hub model in full."""
    path = expand_user(name)
    if path.exists():
        # The rest of the path is of this machine. Absolute first, which gives `.` and `..` a name.
        return os.path.basename(os.path.abspath(path))
    return name
