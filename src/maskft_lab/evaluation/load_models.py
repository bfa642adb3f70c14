"""Load the models to evaluate: a model, adapters over it, or parts of a change to it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import load_peft_weights

from maskft.masks.codec import SCORES, SCORES_SHA256
from maskft.masks.merge import adapter_tokenizer, one_line
from maskft.models import (
    check_model_source,
    check_tokenizer_fits,
    has_tokenizer,
    is_gguf,
    is_local_folder,
    load_config,
    load_model,
    load_tokenizer,
)
from maskft.tuner.quantized import keep_codes
from maskft.weights import lerp
from maskft_common.errors import UserError, first_line
from maskft_common.files import digest_tensors
from maskft_common.layout import holds_adapter

from .evaluation_arguments import NO_ADAPTER, EvaluationArguments
from .model_facts import (
    adapter_sha256,
    base_and_revision,
    config_sha256,
    differing_key,
    facts_of,
    model_fingerprint,
    portable_name,
)

_BYTES_OF_BFLOAT16 = 2


@dataclass
class Loaded:
    """A model ready to evaluate, with its identity.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        facts: The block ``model`` of its result file.
        identity: A text that changes with the weights.
        before: Of `load_changes`, the weights of the base model by name.
    """

    model: Any
    tokenizer: Any
    facts: dict
    identity: str
    before: dict[str, torch.Tensor] | None = None


def check_models(options: EvaluationArguments) -> None:
    """Check the models and the device of an evaluation as far as possible without loading one.

    Raises:
        UserError: For the first mistake.
    """
    name, revision = options.model_name_or_path, None
    if options.change:
        check_model_source(name)
        # A dict keeps the order: the first mistake is the one in the message.
        for change in dict.fromkeys(options.change):
            _check_change(change, name, options.model_revision)
    else:
        name, revision = base_and_revision(name, options.adapter or [NO_ADAPTER])
    check_device(options.device)
    if options.chat_template_path is not None:
        first, *_ = options.change or options.adapter or [NO_ADAPTER]
        # It reads the template first, and of the model its tokenizer alone.
        _tokenizer(first, name, options.chat_template_path, options.model_revision or revision or "main")


def _check_change(
    change: str,
    base: str,
    base_revision: str | None,
) -> None:
    """Raise for a change that is certainly neither an adapter nor a whole model that computes as the base does.

    Args:
        change: Folder of an adapter, folder or hub name of a whole model, or ``none``.
        base: Folder or hub name of the base model.
        base_revision: Of a base on the hub; None: ``main``.
    """
    if change == NO_ADAPTER or holds_adapter(change):
        return
    check_model_source(change)
    # Of the model no more than its configuration is read.
    try:
        configuration = load_config(change)
    except UserError as error:
        if is_local_folder(change):
            raise
        # A name of the hub, or a folder that is not here.
        raise UserError(
            f"change {change!r} is neither a folder here, with an adapter or a model, nor a model that the hub gives "
            f"({error}); name a folder"
        ) from error

    # W0 + scale * (W - W0) are weights of one architecture: there is no part of another rope or another epsilon.
    base_configuration = load_config(base, revision=base_revision or "main")
    key = differing_key(base_configuration.to_diff_dict(), configuration.to_diff_dict())
    if key is not None:
        raise UserError(
            f"change {change!r} is of another model than {base!r}: their configurations differ in {key}; evaluate it "
            "as a model of its own, with --model_name_or_path"
        )


def _tokenizer(
    source: str,
    base: str,
    template: str | None,
    revision: str,
):
    """The tokenizer of a base model, or of an adapter or a changed model that brings one along.

    Args:
        source: Folder of the adapter or of the changed model, or ``none``.
        base: Folder or hub name of the base model.
        template: File that becomes the chat template.
        revision: Of a base on the hub.
    """
    if holds_adapter(source):
        # Training may have saved another tokenizer or chat template beside the adapter.
        return adapter_tokenizer(source, base, template, revision=revision)
    # A script that trains all weights may have saved no tokenizer beside them.
    is_without = is_local_folder(source) and not is_gguf(source) and not has_tokenizer(source)
    if source == NO_ADAPTER or is_without:
        return load_tokenizer(base, template, revision=revision)
    return load_tokenizer(source, template)


def load_each(options: EvaluationArguments) -> Iterator[Loaded]:
    """Load a base model once, and put one adapter after another over it.

    The yielded model is modified in place by the next iteration.

    Raises:
        UserError: If a folder holds no adapter, or the adapters belong to different base models.
    """
    adapters = options.adapter or [NO_ADAPTER]
    name, revision = base_and_revision(options.model_name_or_path, adapters)
    base = _Base(options, name, revision)
    # The model with the adapter of the iteration before; at first there is none.
    model = base.model
    for adapter in adapters:
        # Remove the adapter of the iteration before. Some leave a trace, which would change all results that follow:
        # PEFT leaves whole modules that were trained in their place, and PiSSA and OSF write into the base's weights.
        if model is not base.model:
            restored = model_fingerprint(model.unload())
            if restored != base.fingerprint:
                base.load_again()

        if adapter == NO_ADAPTER:
            model = base.model
            yield base.loaded(model, adapter, facts_of(base.name), base.fingerprint)
            continue

        # PEFT wraps the model's own layers in place: base.model is wrapped too, until `unload` above.
        with one_line(adapter, f"does not fit {base.name!r}"):
            model = PeftModel.from_pretrained(base.model, adapter)
        sha256 = adapter_sha256(adapter)
        facts = {
            "adapter": portable_name(adapter),
            "adapter_sha256": sha256,
            "num_bytes": _adapter_bytes(adapter),
            **facts_of(adapter),
        }
        identity = f"{base.fingerprint}+{sha256}"
        yield base.loaded(model, adapter, facts, identity)


def load_changes(options: EvaluationArguments) -> Iterator[Loaded]:
    """Yield a base model with part of a change to it, W0 + scale * (W - W0), one ``change`` after another.

    In memory are the base and one change: W is loaded into the model again for each scale, and mixed with W0 there.
    The yielded model is modified in place by the next iteration.

    Raises:
        UserError: If a folder holds neither an adapter nor a model, or one of another model.
    """
    changes = options.change or []
    scales = options.scale or [1.0] * len(changes)
    check_model_source(options.model_name_or_path)
    base = _Base(options, options.model_name_or_path)
    model = base.model.to(base.device)
    tied = _tied_names(model)
    # The base's only copy: each change overwrites the model.
    before = weights_of(model)
    # By change: its scales follow one another, and the digest of a whole model reads all its weights.
    sha256_of: dict[str, str] = {}
    for change, scale in zip(changes, scales, strict=True):
        _set_weights(model, before)
        if change == NO_ADAPTER:
            facts = {"scale": scale, **facts_of(base.name)}
            identity = f"{base.fingerprint}+0"
            yield base.loaded(model, change, facts, identity, before)
            continue

        # Before the weights are mixed: the digest is of the change, whatever the scale.
        model = _with_change(model, before, change, options.dtype, tied)
        if change not in sha256_of:
            if holds_adapter(change):
                sha256_of[change] = adapter_sha256(change)
            else:
                sha256_of[change] = _weights_sha256(model)
        facts = {
            "scale": scale,
            "adapter": portable_name(change),
            "adapter_sha256": sha256_of[change],
            "num_bytes": _stored_bytes(change, model, before),
            **facts_of(change),
        }

        # W0 + scale * (W - W0), in place of W.
        for name, parameter in model.named_parameters():
            lerp(before[name], parameter.data, scale, out=parameter.data)
        identity = f"{base.fingerprint}+{scale}*{sha256_of[change]}"
        yield base.loaded(model, change, facts, identity, before)


class _Base:
    """The model that adapters and changes belong to, loaded, with its identity.

    Args:
        options: The options of the evaluation.
        name: Folder or hub name of the model.
        revision: Of a hub model, as an adapter names it; the user's option goes first.
    """

    def __init__(
        self,
        options: EvaluationArguments,
        name: str,
        revision: str | None = None,
    ):
        self.name = name
        # Before the model is loaded, which may take minutes.
        self.device = check_device(options.device)
        self.dtype = options.dtype
        self.revision = options.model_revision or revision or "main"
        self.template = options.chat_template_path
        self.model = self._load()
        # Before any adapter is put over the model, which would add weights and rename layers.
        self.fingerprint = model_fingerprint(self.model)
        # Read once, before an adapter could change it.
        self.configuration = {
            **self.model.config.to_diff_dict(),
            "generation": self.model.generation_config.to_diff_dict(),
        }

    def _load(self) -> Any:
        model = load_model(self.name, self.dtype, revision=self.revision).eval()
        # It may answer alone before a mask is put over it.
        keep_codes(model)
        return model

    def load_again(self) -> None:
        """Replace a model that an adapter has changed."""
        # Freed first, so that memory holds one model: who was given the old one may still refer to it.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.model = self._load()

    def loaded(
        self,
        model,
        source: str,
        facts: dict,
        identity: str,
        before=None,
    ) -> Loaded:
        """Add the tokenizer, and the facts about the base model.

        Args:
            model: This model, with the adapter or the change of ``source``.
            source: Folder of the adapter or of the changed model, or ``none``.
            facts: Facts about ``source``.
            identity: A text that changes with the weights.
            before: Weights of the base by name, for a change.
        """
        tokenizer = _tokenizer(source, self.name, self.template, self.revision)
        check_tokenizer_fits(model, tokenizer)
        facts = {
            "name_or_path": portable_name(self.name),
            "fingerprint": self.fingerprint,
            **facts,
            "config_sha256": config_sha256(self.configuration, tokenizer),
        }
        model = model.to(self.device).eval()
        return Loaded(model, tokenizer, facts, identity, before)


def _with_change(
    model,
    before: dict[str, torch.Tensor],
    change: str,
    dtype: str,
    tied: Mapping[str, str],
) -> Any:
    """The model after a change: with a merged adapter, or with the weights of another whole model.

    Args:
        model: Holds the weights ``before``; modified in place.
        before: Weights of the base model by name; those that an adapter unties are added.
        change: Folder of an adapter or of a whole model.
        dtype: To load a whole model in.
        tied: Second name of a parameter of the base model -> the name under which ``before`` has it.
    """
    # An adapter. It is merged: W0 + scale * (W - W0) needs the weights W.
    if holds_adapter(change):
        with one_line(change, "does not fit"):
            model = PeftModel.from_pretrained(model, change).merge_and_unload().eval()
        # PEFT's objects refer to each other in cycles, and hold the adapter's weights until these are collected.
        gc.collect()
        for name, parameter in model.named_parameters():
            # An adapter with a trained output of its own unties it from the embedding. Before, it was the embedding.
            if name in tied and name not in before:
                before[name] = before[tied[name]]
            # PEFT trains whole modules in float32, whatever the base's dtype is.
            if name in before:
                parameter.data = parameter.data.to(before[name].dtype)
        _check_same(before, dict(model.named_parameters()), change)
        return model

    # A whole model
    check_model_source(change)
    # The weights that are replaced are freed first, so that memory holds two models and not three.
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    after = load_model(change, dtype)
    weights = {name: parameter.data for name, parameter in after.named_parameters()}
    every_name = dict(after.named_parameters(remove_duplicate=False))
    # An adapter before this change may have untied them.
    for name in before:
        if name in every_name:
            weights[name] = every_name[name].data
    del after, every_name
    _check_same(before, weights, change)
    for name, parameter in model.named_parameters():
        # A copy: loaded weights may be a file mapped into memory, which nothing may write to. One tensor at a time:
        # each is freed by pop() before the next is copied.
        parameter.data = weights.pop(name).to(parameter.device, copy=True)
    return model


def _check_same(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    change: str,
) -> None:
    """Raise if two sets of weights differ in a name, a shape or a dtype."""
    # A dict keeps the order of the names, which a set would not: the first that differs is the one in the message.
    for name in {**before, **after}:
        is_in_both = name in before and name in after
        if not is_in_both or before[name].shape != after[name].shape:
            raise UserError(f"change {change!r} is of another model: {name} is not in both, or of another shape")
        if before[name].dtype != after[name].dtype:
            raise UserError(
                f"change {change!r} is in {after[name].dtype} and the base in {before[name].dtype} ({name}); pass "
                "--dtype float32, which reads both in one"
            )


def _weights_sha256(model) -> str:
    weights = sorted(model.named_parameters())
    return digest_tensors(weights)


def _stored_bytes(change: str, model, before: Mapping[str, torch.Tensor]) -> int:
    """Bytes that have to be stored for a change: masks coded, all other numbers in bfloat16.

    Args:
        change: Its folder.
        model: The model with all of the change.
        before: The base's parameters.
    """
    if holds_adapter(change):
        return _adapter_bytes(change)
    # Parameters that training left alone are the base's: full fine-tuning may be of some layers only.
    changed = [parameter for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    return sum(_BYTES_OF_BFLOAT16 * parameter.numel() for parameter in changed)


def _adapter_bytes(adapter: str) -> int:
    """Bytes that have to be stored for an adapter: masks coded, all other numbers in bfloat16.

    Args:
        adapter: Its folder.
    """
    # adapter_model.safetensors, or .bin of an older PEFT.
    with one_line(adapter, "has no weights that PEFT can read"):
        tensors = load_peft_weights(adapter, device="cpu")
    num_bytes = 0
    for name, tensor in tensors.items():
        # Where the file has a mask as coded, only further training needs its scores and their checksum.
        module = name.removesuffix(SCORES).removesuffix(SCORES_SHA256)
        if module != name and f"{module}.mask_coded" in tensors:
            continue
        # Adapters are saved in the dtype of their training. In one dtype for all, sizes of methods can be compared.
        if tensor.is_floating_point():
            num_bytes += _BYTES_OF_BFLOAT16 * tensor.numel()
        else:
            num_bytes += tensor.nbytes
    return num_bytes


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of all parameters; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _tied_names(model) -> dict[str, str]:
    """Of parameters that have several names, each further name -> the first."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name = first_names[id(parameter)]
        if name != first_name:
            tied[name] = first_name
    return tied


@torch.no_grad()
def _set_weights(model, weights: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def check_device(device: str | None) -> str:
    """The device to run on; an unknown one is refused before a model is loaded for it."""
    if not device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # RuntimeError for an unknown device, AssertionError for CUDA in a build of torch without it.
        # To allocate is the only test that covers names, drivers and numbers of devices.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} cannot be used ({first_line(error)}); name another: cpu, cuda, cuda:1, mps"
        ) from None
    return device
