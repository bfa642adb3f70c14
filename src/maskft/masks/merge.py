"""Write a mask into its base model: an ordinary checkpoint that plain transformers loads."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError

from maskft_common import files
from maskft_common.errors import UserError, first_line, printable

from ..models import base_of, check_model_source, check_named_base, has_tokenizer, load_model, load_tokenizer
from ..tuner import MaskedLinear, adapter_layers
from ..tuner.targets import listed
from ..weights import lerp
from .codec import PREFIX, decode_mask, total_counts
from .fingerprints import base_fingerprint, quantisation_of
from .mask_set import read_coded, read_config, weights_file

# The name that PeftModel.from_pretrained gives.
_ADAPTER = "default"
# Random tokens on which the merged model is compared with the masked one.
_PROBE_SEQUENCES = 2
_PROBE_TOKENS = 64
# Errors that PEFT, torch and safetensors raise for an adapter that does not fit.
ONE_LINE = (
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
    # For an invalid regular expression in target_modules.
    re.error,
)


def load_masked(adapter: str | Path, base: str | None = None, dtype: str = "float32"):
    """Load a base model with a mask adapter over it; returns ``(model, tokenizer, base name)``.

    Args:
        adapter: Adapter folder.
        base: Base model; default: the one named in the adapter.
        dtype: See ``load_model``.

    Raises:
        UserError: If the adapter does not fit the base, or names no base and none is given.
    """
    name, revision = _base_and_revision(adapter, base)
    check_model_source(name)
    # Before the model, which may take minutes to load: a base or an adapter saved in Python may have no tokenizer.
    tokenizer = adapter_tokenizer(adapter, name, revision=revision)
    model = _load_over(adapter, name, revision, dtype)
    return model, tokenizer, name


def load_masked_model(adapter: str | Path, base: str | None = None, dtype: str = "float32"):
    """:func:`load_masked` without the tokenizer; returns ``(model, base name, revision of the base)``."""
    name, revision = _base_and_revision(adapter, base)
    return _load_over(adapter, name, revision, dtype), name, revision


def _base_and_revision(adapter: str | Path, base: str | None) -> tuple[str, str]:
    """The base to load an adapter over, by default the one that it names, and its revision on the hub."""
    config = read_config(adapter)
    # PEFT would look for a missing file on the hub, under the path of the folder.
    weights_file(adapter)
    name = base
    # An empty name is no default: it is what "$BASE" becomes in a shell where BASE is not set.
    if name is None:
        name = base_of(adapter, config.base_model_name_or_path or "")
        if not name:
            raise UserError(f"the adapter {str(adapter)!r} does not name its base model; pass --base")
        check_named_base(adapter, name, "--base")

    # The revision in the adapter is of the base that it names.
    is_named_base = base in (None, config.base_model_name_or_path)
    revision = "main"
    if is_named_base and config.revision:
        revision = config.revision
    return name, revision


def _load_over(
    adapter: str | Path,
    name: str,
    revision: str,
    dtype: str,
):
    """The model of this name with the adapter over it."""
    model = load_model(name, dtype, revision=revision)
    with one_line(adapter, f"does not fit {name!r}"):
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    return model


@contextmanager
def one_line(adapter: str | Path, problem: str) -> Iterator[None]:
    """Turn the errors that PEFT raises for an adapter into one line."""
    try:
        yield
    except UserError:
        # Already one line. UserError is a ValueError, so this clause comes first.
        raise
    except ONE_LINE as error:
        kind = type(error).__name__
        raise UserError(f"adapter {str(adapter)!r} {problem} ({kind}: {first_line(error)}); check both") from error


def merge(
    adapter: str | Path,
    output_dir: str | Path,
    base: str | None = None,
    dtype: str = "auto",
    scale: float = 1.0,
) -> str:
    """Merge a mask into its base, verify the result, and write it as an ordinary checkpoint.

    The folder gets weights, tokenizer, chat template and generation config. It is written beside its place and moved
    there only when plain transformers, loading it afresh, gives bit for bit the logits of the masked model on a probe
    and has exactly the removed weights at zero.

    Args:
        adapter: Adapter folder.
        output_dir: Where the checkpoint goes; must not exist or be empty.
        base: Base model; default: the one named in the adapter.
        dtype: Dtype of the written weights: float32, bfloat16, float16 or auto, that of the base.
        scale: Part of the change, in (0, 1]: removed weights keep the rest of their value, as in a path of a study.

    Returns:
        A line that says how many weights were set, and where.

    Raises:
        UserError: If the output is not empty, the adapter does not fit, the base is stored as codes, the masked model
            computes NaN, or the written checkpoint differs; it is then deleted.
    """
    output_dir = files.new_folder(output_dir, "output_dir")
    if not 0 < scale <= 1:
        raise UserError(f"scale is {scale}; it is the part of the change, in (0, 1]")

    config = read_config(adapter)
    replaced = printable(listed(config.weights_sha256 or ()))
    if scale < 1 and config.weights_sha256:
        raise UserError(
            f"scale is {scale}, and the adapter also replaces weights ({replaced}), which would be written in full: "
            "leave out --scale"
        )
    model, tokenizer, name = _load_to_merge(adapter, base, dtype)
    # transformers cannot save such a model once it was loaded, and the checks below are for floats.
    stored_as = quantisation_of(adapter_layers(model).values())
    if stored_as is not None:
        raise UserError(
            f"base {name!r} is stored as {stored_as}, and merge writes floats: name the model that it was made from "
            "with --base, or merge in Python, with model.merge_and_unload()"
        )
    # For the checks below: merging removes masks and values from the model. Masks stay coded, an eighth of their size.
    coded = read_coded(adapter)
    removed_values = _removed_values(model, scale)
    probe = _probe(model)
    expected = _logits(model, probe)
    # NaN differs from itself, so that the written checkpoint would seem to be another model.
    if bool(expected.isnan().any()):
        raise UserError(
            f"the masked model computes NaN in {_dtype_name(model)}; check the weights of its base {name!r}, or name "
            "another --dtype: in float16, numbers beyond 65,504 are infinite"
        )

    # Merge, save, load afresh, compare.
    merged = model.merge_and_unload()
    # The masked layers keep what would undo the merge, over a byte a weight. They and their maskers name each other, so
    # that Python frees them only when it looks for such cycles.
    gc.collect()
    # A base that was trained further may say False, and generation would be slow.
    merged.config.use_cache = True
    with files.whole_folder(output_dir) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        files.use_default_modes(partial)
        # An error in these checks removes the folder. In the dtype of the folder: another one would round the weights.
        written = load_model(str(partial), _dtype_name(merged))
        _check_logits(written, probe, expected)
        _check_removed(written, coded, removed_values)

    target = "zero"
    if config.removed_value_model:
        model_name = Path(config.removed_value_model).name
        target = f"their value in {printable(model_name)}"
    share = "" if scale == 1 else f"{scale:g} of the way to "
    beside = f"; replaced in full: {replaced}" if config.weights_sha256 else ""
    numel, num_removed = total_counts(coded)
    return (
        f"{output_dir}: {num_removed:,} of {numel:,} weights in {len(coded)} modules set to "
        f"{share}{target}{beside}; reloaded and bitwise equal to the masked model on a probe"
    )


def _load_to_merge(adapter: str | Path, base: str | None, dtype: str):
    """:func:`load_masked`, after the base was compared with that of the training, also where float16 is asked for."""
    # In float16 any weights pass with a warning (``is_the_base``): a model may have been rounded to it. As they are
    # stored they are compared here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "base weights are in float16")
        if dtype == "float16":
            as_stored, _, _ = load_masked_model(adapter, base, "auto")
            _check_stored_base(adapter, as_stored)
            # Freed before it is loaded once more.
            del as_stored
            gc.collect()
        loaded = load_masked(adapter, base, dtype)
    if dtype == "auto":
        model, _, _ = loaded
        _check_stored_base(adapter, model)
    return loaded


def _check_stored_base(adapter: str | Path, model) -> None:
    """Raise if a base that is stored in float16 is not the one that the mask was trained over."""
    config = model.peft_config[_ADAPTER]
    layers = list(adapter_layers(model).values())
    is_half = any(layer.get_base_dtype() == torch.float16 for layer in layers)
    # Other dtypes were compared when the adapter was loaded.
    is_recorded = config.base_fingerprint is not None
    if not is_half or not config.verify_base or not is_recorded:
        return
    # Trained over codes: the weights that these were made from have other values. In float16 that was not said.
    if config.base_quantisation != quantisation_of(layers):
        warnings.warn(
            f"the mask was trained over weights stored as {config.base_quantisation}, and these are stored as float16: "
            "it was not made for their rounding; measure the result"
        )
        return
    found = base_fingerprint(layers)
    if found != config.base_fingerprint:
        raise UserError(
            f"the adapter {str(adapter)!r} was trained on other base weights (fingerprint "
            f"{config.base_fingerprint[:12]}) than these, stored in float16 ({found[:12]}); name the right base with "
            "--base (or, if this one is its conversion to float16, merge in Python, with model.merge_and_unload())"
        )


def _dtype_name(model) -> str:
    """The dtype of a model as :func:`load_model` takes it, such as ``float16``."""
    return str(model.dtype).removeprefix("torch.")


def _removed_values(model, scale: float) -> dict[str, torch.Tensor | None]:
    """What removed weights become (None: zero), by the names that the merged model has; set in the model for a part."""
    values = {}
    for full_name, layer in adapter_layers(model).items():
        # A mask over a part of the change is a mask whose removed weights take values, in place of zero.
        if scale < 1:
            _scale_change(layer, scale)
        module = full_name.removeprefix(PREFIX)
        values[module] = layer.removed_value(_ADAPTER)
    return values


def _scale_change(layer: MaskedLinear, scale: float) -> None:
    """Let removed weights go only this part of the way from their value to that of a removed weight."""
    weight = layer.weight.detach()
    # None: removed weights are zero.
    end = layer.removed_value(_ADAPTER)
    if end is None:
        end = torch.zeros_like(weight)
    # Merging writes these values in the place of the removed weights.
    layer.removed_values[_ADAPTER] = lerp(weight, end, scale)


def adapter_tokenizer(
    adapter: str | Path,
    base: str,
    *template,
    **kwargs,
):
    """The tokenizer saved with the adapter, or that of its base model; see ``models.load_tokenizer``."""
    # maskft train saves one with the adapter; a script that trains with PEFT may not.
    source = str(adapter) if has_tokenizer(adapter) else base
    return load_tokenizer(source, *template, **kwargs)


def _probe(model) -> torch.Tensor:
    """Random token ids, the same at every call; shape (_PROBE_SEQUENCES, T)."""
    # The size of the embedding; the tokenizer may have fewer tokens.
    embedding = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    # At most as long as the model's context.
    longest = getattr(model.config, "max_position_embeddings", None) or _PROBE_TOKENS
    shape = (_PROBE_SEQUENCES, min(_PROBE_TOKENS, longest))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return ids.to(model.device)


@torch.inference_mode()
def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits in evaluation mode, on the CPU; shape (num_sequences, T, vocabulary)."""
    model.eval()
    output = model(input_ids=ids, use_cache=False)
    return output.logits.cpu()


def _check_logits(written, probe: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless the written checkpoint computes the same bits."""
    # On the masked model's device: kernels of another device round differently.
    found = _logits(written.to(probe.device), probe)
    if not torch.equal(found, expected):
        raise UserError("the written checkpoint does not give the masked model's logits bit for bit; it was deleted")


def _check_removed(
    written,
    coded: Mapping[str, torch.Tensor],
    removed_values: Mapping[str, torch.Tensor | None],
) -> None:
    """Raise unless every removed weight of the written checkpoint is zero or has the value that it is to take."""
    for name, data in coded.items():
        module = written.get_submodule(name)
        weight = module.weight.detach().cpu()
        removed = ~decode_mask(data, name, weight.shape)
        # Zero for all, or a value for each.
        values = removed_values[name]
        expected: float | torch.Tensor = 0.0
        if values is not None:
            expected = values.cpu()[removed]
        is_as_expected = weight[removed] == expected
        if not bool(is_as_expected.all()):
            raise UserError(f"the written checkpoint has other weights where {name} is masked; it was deleted")
