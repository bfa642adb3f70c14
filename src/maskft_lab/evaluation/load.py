"""Load what is to be evaluated: a model, or a model with an adapter over it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from maskft.data.tokenizing import tokenizer_rules
from maskft.masks.codec import encode_mask, is_of_mask
from maskft.masks.mask_set import MaskSet, read_config
from maskft.masks.merge import adapter_tokenizer, one_line
from maskft.models import base_of, check_model_source, check_tokenizer_fits, load_model, load_tokenizer
from maskft.training.method_arguments import MASK_METHODS
from maskft.weights import lerp
from maskft_common.errors import UserError, first_line
from maskft_common.files import digest, digest_tensors, read_json
from maskft_common.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING, holds_adapter, no_adapter

from .arguments import EvaluationArguments

NO_ADAPTER = "none"  # the name under which the base model itself is evaluated among adapters
# Fields of an adapter_config.json that change no output: where the base was, how it was trained, who wrote it.
_CHANGE_NO_OUTPUT_OF_ADAPTER = (
    *("base_model_name_or_path", "recipe", "inference_mode", "peft_version", "revision"),
    "base_quantisation",
)
# And of a model's configuration, as do keys that begin with an underscore; the dtype is a setting of the evaluation.
_CHANGE_NO_OUTPUT_OF_MODEL = ("transformers_version", "dtype", "torch_dtype", "architectures", "attn_implementation")


@dataclass
class Loaded:
    """A model ready to evaluate, and what is known of it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        facts: What goes into its result file.
        identity: A text that changes with the weights.
        before: Of `load_changes`, the weights of the base model by name.
    """

    model: Any
    tokenizer: Any
    facts: dict
    identity: str
    before: dict[str, torch.Tensor] | None = None


def load_each(options: EvaluationArguments) -> Iterator[Loaded]:
    """Load a base model once, and put one adapter after another over it.

    What was yielded is no longer to be used when the next is asked for: it is the same model.

    Raises:
        UserError: If a folder is not what it should be, or the adapters belong to different base models.
    """
    adapters = options.adapter or [NO_ADAPTER]
    base = _Base(options, *_base(options.model_name_or_path, adapters))
    model = base.model
    for adapter in adapters:
        if model is not base.model and model_fingerprint(model.unload()) != base.fingerprint:
            raise RuntimeError(f"unloading the adapter before {adapter!r} did not restore the base model")
        model, facts, identity = base.model, {}, base.fingerprint
        if adapter == NO_ADAPTER:
            facts = facts_of(base.name)
        else:
            with one_line(adapter, f"does not fit {base.name!r}"):
                model = PeftModel.from_pretrained(base.model, adapter)
            sha256 = adapter_sha256(adapter)
            identity = f"{identity}+{sha256}"
            facts = {"adapter": _portable(adapter), "adapter_sha256": sha256, **facts_of(adapter)}
        yield base.loaded(model, adapter, facts, identity)


def load_changes(options: EvaluationArguments) -> Iterator[Loaded]:
    """Yield a base model with part of a change to it, W0 + scale * (W - W0), one ``change`` after another.

    In memory are the base and one change: W is loaded into the model again for each scale, and mixed with W0 there.
    The yielded model is modified in place by the next iteration.

    Raises:
        UserError: If a folder is not what it should be, or of another model.
    """
    changes = options.change or []
    scales = options.scale or [1.0] * len(changes)
    check_model_source(options.model_name_or_path)
    base = _Base(options, options.model_name_or_path)
    model = base.model.to(base.device)
    before = weights_of(model)
    sha256_of: dict[str, str] = {}
    for change, scale in zip(changes, scales, strict=True):
        facts = {"scale": scale}
        identity = f"{base.fingerprint}+0"
        _set_weights(model, before)
        if change != NO_ADAPTER:
            model = _with_change(model, before, change, options.dtype)
            if change not in sha256_of:
                sha256_of[change] = adapter_sha256(change) if holds_adapter(change) else _weights_sha256(model)
            facts["adapter"] = _portable(change)
            facts["adapter_sha256"] = sha256_of[change]
            facts["num_bytes"] = _stored_bytes(change, model)
            identity = f"{base.fingerprint}+{scale}*{sha256_of[change]}"
            for name, parameter in model.named_parameters():
                lerp(before[name], parameter.data, scale, out=parameter.data)
        facts |= facts_of(change if change != NO_ADAPTER else base.name)
        yield base.loaded(model, change, facts, identity, before)


class _Base:
    """The model that adapters and changes belong to, loaded, and what is known of it."""

    def __init__(self, options: EvaluationArguments, name: str, revision: str | None = None):
        self.name, self.device = name, check_device(options.device)
        self.revision = options.model_revision or revision or "main"
        self.template = options.chat_template_path
        self.model = load_model(name, options.dtype, revision=self.revision).eval()
        self.fingerprint = model_fingerprint(self.model)
        generation = self.model.generation_config.to_diff_dict()
        self.configuration = {**self.model.config.to_diff_dict(), "generation": generation}

    def loaded(self, model, source: str, facts: dict, identity: str, before=None) -> Loaded:
        """``model``, which is this one with what is in the folder ``source``."""
        tokenizer = (
            load_tokenizer(self.name, self.template, revision=self.revision)
            if source == NO_ADAPTER
            else adapter_tokenizer(source, self.name, self.template, revision=self.revision)
        )
        check_tokenizer_fits(model, tokenizer)
        facts = {"name_or_path": _portable(self.name), "fingerprint": self.fingerprint} | facts
        facts["config_sha256"] = config_sha256(self.configuration, tokenizer)
        return Loaded(model.to(self.device).eval(), tokenizer, facts, identity, before)


def _with_change(model, before: Mapping[str, torch.Tensor], change: str, dtype: str) -> Any:
    """The model with the weights it has after a change: those of a merged adapter, or of another whole model.

    Args:
        model: Holds the weights ``before``; modified in place.
        before: Weights of the base model by name.
        change: Folder of an adapter or of a whole model.
        dtype: To load a whole model in.
    """
    if holds_adapter(change):
        with one_line(change, "does not fit"):
            model = PeftModel.from_pretrained(model, change).merge_and_unload().eval()
        gc.collect()  # PEFT's objects refer to each other in cycles, and hold the adapter's weights until then
        _check_same_shapes(before, dict(model.named_parameters()), change)
        return model
    check_model_source(change)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)  # room for the other model's weights
    after = load_model(change, dtype)
    weights = {name: parameter.data for name, parameter in after.named_parameters()}
    del after
    _check_same_shapes(before, weights, change)
    for name, parameter in model.named_parameters():
        # A copy, one tensor at a time: loaded weights may be a file mapped into memory, which nothing may write to.
        parameter.data = weights.pop(name).to(parameter.device, copy=True)
    return model


def _check_same_shapes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], change: str) -> None:
    """Raise if two sets of weights differ in a name or a shape."""
    for name in {**before, **after}:
        if name not in before or name not in after or before[name].shape != after[name].shape:
            raise UserError(f"change {change!r} is of another model: {name} is not in both, or of another shape")


def _weights_sha256(model) -> str:
    return digest_tensors(sorted(model.named_parameters()))


def _stored_bytes(change: str, model) -> int:
    """Bytes that have to be stored for a change: masks coded, all other numbers in bfloat16."""
    if not holds_adapter(change):
        return sum(2 * parameter.numel() for parameter in model.parameters())
    tensors = load_file(Path(change) / ADAPTER_WEIGHTS)
    if facts_of(change)["method"] in MASK_METHODS:  # without scores; modules trained beside the mask count
        tensors = {name: tensor for name, tensor in tensors.items() if not is_of_mask(name)}
        tensors |= {name: encode_mask(mask) for name, mask in MaskSet.from_adapter(change).items()}
    return sum(t.numel() * 2 if t.is_floating_point() else t.nbytes for t in tensors.values())


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def _set_weights(model, weights: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def check_device(device: str | None) -> str:
    """The device to run on; one that is not here is refused before a model is loaded for it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} cannot be used ({first_line(error)}); name another: cpu, cuda, cuda:1, mps"
        ) from None
    return device


# Identities


def model_fingerprint(model) -> str:
    """sha256 over the names, dtypes, shapes and bytes of all weights."""
    weights = sorted(model.state_dict().items())
    return digest_tensors((f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor) for name, tensor in weights)


def config_sha256(configuration: Mapping, tokenizer) -> str:
    """sha256 over what changes outputs in a model's configuration and in its tokenizer, chat template apart."""
    return digest({"configuration": _without_unused(configuration), **tokenizer_rules(tokenizer)})


def _without_unused(value):
    """A configuration without the keys that change no output, at every depth."""
    if not isinstance(value, Mapping):
        return value
    kept = {str(key): _without_unused(each) for key, each in value.items()}
    return {k: each for k, each in kept.items() if k not in _CHANGE_NO_OUTPUT_OF_MODEL and not k.startswith("_")}


def adapter_sha256(folder: str) -> str:
    """sha256 over an adapter's weights and what its ``adapter_config.json`` says about their use."""
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    used = {
        # PEFT writes sets, target_modules for one, in no fixed order.
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in _CHANGE_NO_OUTPUT_OF_ADAPTER
    }
    weights = b"".join(file.read_bytes() for file in sorted(Path(folder).glob("adapter_model.*")))
    return digest(json.dumps(used, sort_keys=True).encode() + weights)


# What folders say


def _base(name: str | None, adapters: Sequence[str]) -> tuple[str, str | None]:
    """The base model, and the revision of it that the adapters were trained on, where they say one.

    Raises:
        UserError: If a folder is not what it should be, or the adapters belong to different models or revisions.
    """
    configs = {adapter: _peft_config(adapter) for adapter in adapters if adapter != NO_ADAPTER}
    named = {
        adapter: base_of(adapter, config.base_model_name_or_path) if config.base_model_name_or_path else None
        for adapter, config in configs.items()
    }
    if name is None and len(set(named.values())) == 1:
        [name] = set(named.values())
    if name is None:
        shown = ", ".join(f"{Path(adapter).name}: {base}" for adapter, base in named.items()) or "there are none"
        raise UserError(f"the adapters do not name one base model ({shown}); pass --model_name_or_path")
    check_model_source(name)
    revisions = {config.revision for adapter, config in configs.items() if named[adapter] == name}
    if len(revisions) > 1:
        raise UserError(f"the adapters belong to different revisions of {name!r}; evaluate them one by one")
    return name, next(iter(revisions), None)


def _peft_config(adapter: str) -> PeftConfig:
    if not holds_adapter(adapter):
        raise no_adapter(adapter)
    with one_line(adapter, "has no adapter_config.json that PEFT can read"):
        config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config.base_model_name_or_path, str | None):
        raise UserError(f"{adapter!r}: base_model_name_or_path is {config.base_model_name_or_path!r}; write a name")
    return config


def facts_of(source: str) -> dict:
    """What the folder of a model or an adapter says of its training: method and seed, and of a mask its fingerprint.

    A folder from elsewhere, whose ``training.json`` is no such file, says nothing.
    """
    kind = _peft_config(source).peft_type if holds_adapter(source) else None
    kind = kind and str(getattr(kind, "value", kind))
    if kind == "MASK":
        config = read_config(source)
        facts = {"method": config.recipe.get("method", "mask"), "seed": config.recipe.get("seed")}
        return {"mask_fingerprint": config.mask_sha256, **facts}
    file = Path(source) / TRAINING
    content = read_json(file) if file.is_file() else None
    recipe = content.get("recipe") if isinstance(content, dict) else None
    facts = {key: recipe.get(key) for key in ("method", "seed")} if isinstance(recipe, dict) else {}
    return {"method": kind.lower(), **facts} if kind else facts


def _portable(name: str) -> str:
    """A result file is shared: a folder is named by its last component, a hub model in full."""
    return Path(name).name if Path(name).exists() else name
