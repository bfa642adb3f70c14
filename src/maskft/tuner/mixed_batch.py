"""Batches whose rows use different masks: ``model.generate(..., adapter_names=["sums", "intents", "__base__"])``.

The interface is the one PEFT has for LoRA. A mask has no values, only the places R that it removes, so all rows share
one base weight W, and a row is corrected by the base's own values at the places of its mask:

    y = x W^T - x (W * R)^T

``W * R`` is sparse. The corrections of all rows of a batch are one product with a block diagonal sparse matrix, one
block a row, which is kept while the same adapters follow each other in the same rows, as they do while tokens are
generated. A dense weight per adapter, the plain way, was measured beside it: one matrix product per adapter has to read
all weights again, and was slower in decoding at every share removed up to a half, and in prefill up to 0.4.

Shapes: B rows (examples), T tokens of each (all dimensions between the first and the last), I in_features,
O out_features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef
from transformers import GenerationConfig

from maskft_common.errors import UserError, did_you_mean

from .selection import has_soft_gate

if TYPE_CHECKING:
    from .layer import MaskedLinear, SavedMask

BASE = "__base__"  # PEFT's name of a row without an adapter
# Names of a model's input, which generate() repeats.
_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values")
# Architectures whose layers get (T, B, I).
_TOKENS_FIRST = ("fsmt", "xlnet")


class Places(NamedTuple):
    """The removed places of one mask, by rows of the (O, I) weight: about two bytes a place.

    Attributes:
        offsets: Where each row begins in ``columns``, and where the last ends; int32, shape (O + 1,).
        columns: Input feature of each place, in row order; int16 where I allows it, else int32.
    """

    offsets: Tensor
    columns: Tensor


@dataclass
class BatchPlan:
    """The corrections of one batch of adapter names: a block diagonal sparse matrix, one block a masked row.

    Attributes:
        rows: Indices of the rows that have a mask in this layer; None: all rows.
        shape: Shape of the matrix, (num_rows * O, num_rows * I).
        offsets: Where each row of the matrix begins; int32, one more for the end.
        columns: Column of each place; int32.
        values: Dtype that the base layer computes in -> the base weight at each place as rounded to it, float32
            (float64 for a float64 base).
        base_weight: The dequantised base weight of a quantised layer; None: the layer computes with its weight.
        matrices: The same as sparse tensors over the same memory, where torch has a product with them.
        base_weights: Dtype of the input -> ``base_weight`` in it.
    """

    rows: Tensor | None
    shape: tuple[int, int]
    offsets: Tensor
    columns: Tensor
    values: dict[torch.dtype, Tensor]
    base_weight: Tensor | None = None
    matrices: dict[torch.dtype, Tensor] = field(default_factory=dict)
    base_weights: dict[torch.dtype, Tensor] = field(default_factory=dict)

    # Tensors that are created inside torch.inference_mode() could not be used outside of it afterwards.
    @torch.inference_mode(False)
    @torch.no_grad()
    def values_in(self, dtype: torch.dtype) -> Tensor:
        """Values as rounded as the base layer's own weight: under autocast that is not the dtype of the weight."""
        if dtype not in self.values:
            first = next(iter(self.values.values()))
            # Rounded to `dtype`, but stored in the dtype in which the correction is summed.
            rounded = first.to(dtype)
            self.values[dtype] = rounded.to(first.dtype)
        return self.values[dtype]

    @torch.inference_mode(False)
    @torch.no_grad()
    def base_weight_in(self, dtype: torch.dtype) -> Tensor:
        """The base weight in the dtype of the input, in which quantised layers compute."""
        assert self.base_weight is not None
        if dtype not in self.base_weights:
            self.base_weights[dtype] = self.base_weight.to(dtype)
        return self.base_weights[dtype]

    @torch.inference_mode(False)
    @torch.no_grad()
    def matrix_in(self, dtype: torch.dtype) -> Tensor:
        """The sparse matrix with :meth:`values_in`."""
        if dtype not in self.matrices:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
                # Without the check of the indices, which would cost a pass over them: _make_plan has built them.
                self.matrices[dtype] = torch.sparse_csr_tensor(
                    self.offsets,
                    self.columns,
                    self.values_in(dtype),
                    self.shape,
                    check_invariants=False,
                )
        return self.matrices[dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; matrices share theirs."""
        tensors = [self.offsets, self.columns, *self.values.values()]
        if self.base_weight is not None:
            tensors.append(self.base_weight)
        # In its own dtype the base weight is the same tensor.
        for weight in self.base_weights.values():
            if weight is not self.base_weight:
                tensors.append(weight)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class MixedBatchCache:
    """State that one layer keeps between mixed batches.

    Attributes:
        places: Adapter name -> (version of its mask, the saved mask or None, the places of the mask). The saved mask
            is held because its id is the version, and a freed id may be given to the next mask.
        plan: (its inputs, the corrections of the latest batch), or None.
    """

    def __init__(self) -> None:
        self.places: dict[str, tuple[object, SavedMask | None, Places]] = {}
        self.plan: tuple[object, BatchPlan | None] | None = None

    def forget(self, adapter_name: str) -> None:
        """Free everything kept for an adapter."""
        self.places.pop(adapter_name, None)
        self.plan = None

    def forget_tensors(self) -> None:
        """Free what was computed from tensors of the layer, and with it the weak references to them."""
        self.plan = None
        for adapter_name, (_, saved_mask, _) in list(self.places.items()):
            # Places of scores; those of a saved mask do not change.
            if saved_mask is None:
                del self.places[adapter_name]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors kept."""
        num_bytes = 0
        for _, _, places in self.places.values():
            for tensor in places:
                num_bytes += tensor.numel() * tensor.element_size()
        if self.plan is not None:
            _, plan = self.plan
            if plan is not None:
                num_bytes += plan.num_bytes
        return num_bytes


# The model's side: names come in with a call, and each layer gets them


@contextmanager
def adapter_names_for_layers(
    model: BaseTuner,
    adapter_names: Sequence[str] | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[None]:
    """Pass ``adapter_names`` to every masked layer while the block runs.

    Args:
        model: The mask tuner.
        adapter_names: One name per row of the batch, ``"__base__"`` for no mask; None: does nothing.
        args: Arguments of the call of the model, or of ``generate``.
        kwargs: The same.

    Raises:
        UserError: If the model is in training mode, a name is not loaded, a mask cannot be in a mixed batch, or the
            batch has another number of rows.
    """
    if adapter_names is None:
        yield
        return

    # Before any hook is registered, so that a bad name leaves nothing behind.
    _check_model(model, adapter_names)
    names = list(adapter_names)
    inputs = _inputs(args, kwargs)
    if inputs is not None:
        check_rows(inputs, names)

    # Number of rows that a layer may get -> their names. generate() puts the copies of a row next to each other, as
    # repeat_interleave does. The encoder runs before rows are repeated.
    names_by_rows = {}
    for num_copies in _possible_copies(model, args, kwargs):
        repeated = []
        for name in names:
            repeated += [name] * num_copies
        names_by_rows[len(repeated)] = repeated

    # Rows and tokens of the call that is running: generate() calls the model once for each token.
    call = _Call()
    handles = [model.model.register_forward_pre_hook(call.see, with_kwargs=True)]

    # A hook on each layer, because the modules between the model and its layers do not pass unknown arguments on.
    hook = partial(_add_adapter_names, names=names, names_by_rows=names_by_rows, call=call)
    for module in model.modules():
        # AuxiliaryTrainingWrapper: PEFT's copies of modules_to_save, which choose one per row themselves.
        if isinstance(module, model.tuner_layer_cls | AuxiliaryTrainingWrapper):
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(_flatten_again, call=call)))
    # Also after an error: the next call may have other names, or none.
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Call:
    """The shape of the input of the model's call that is running.

    Attributes:
        num_rows: B; 0 where the input has none of the usual names, or the model has an encoder, whose input has
            another length.
        num_tokens: T of each row.
        unflattened: Layers that are running on an input (B, T, I) and were given (B * T, I).
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        self.unflattened: set[nn.Module] = set()

    def see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A hook of the model, before its forward pass."""
        has_decoder = any(name.startswith("decoder_") for name in kwargs)
        inputs = _inputs(args, kwargs)
        self.num_rows = self.num_tokens = 0
        if not has_decoder and inputs is not None and inputs.dim() >= 2:
            self.num_rows, self.num_tokens = inputs.shape[:2]


def _add_adapter_names(
    module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    names: list[str],
    names_by_rows: Mapping[int, list[str]],
    call: _Call,
) -> Any:
    rows = len(args[0]) if args else len(names)
    # Another number of rows is an error, which names the numbers as the caller knows them.
    names_of_rows = names_by_rows.get(rows, names)
    # Some blocks, as OPT's, give their layers all tokens of the batch in one dimension (B * T, I), row after row.
    is_flat = call.num_tokens > 1 and bool(args) and args[0].dim() == 2 and rows == call.num_rows * call.num_tokens
    if is_flat and call.num_rows in names_by_rows:
        names_of_rows = names_by_rows[call.num_rows]
        x_BTI = args[0].unflatten(0, (call.num_rows, call.num_tokens))
        args = (x_BTI, *args[1:])
        call.unflattened.add(module)
    kwargs["adapter_names"] = names_of_rows
    return args, kwargs


def _flatten_again(module: nn.Module, args: Any, output: Any, call: _Call) -> Any:
    """Give the output the dimensions that the input had before :func:`_add_adapter_names`."""
    if module not in call.unflattened:
        return output
    call.unflattened.remove(module)
    return output.flatten(0, 1)


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a call, one row for each name; None if it has none of the usual names.

    In a forward pass PEFT's models of a task (PeftModelForCausalLM and the like) do not show it here.
    """
    inputs = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    return next((value for value in inputs if isinstance(value, Tensor)), None)


def _possible_copies(model: BaseTuner, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """How often each row of the batch may come: once, or as often as ``generate`` repeats it.

    It takes the number of beams, or of answers if that is larger, from the first of these that has it: its arguments,
    the ``generation_config`` among them, that of the model.
    """
    configs = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
    own = getattr(model.model, "generation_config", None)
    # Without an input it is a forward pass, which repeats nothing.
    if own is not None and _inputs(args, kwargs) is not None:
        configs.append(own)
    copies = {1}
    for option in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(option), *(getattr(config, option) for config in configs)]
        copies.update(value for value in values if isinstance(value, int))
    return copies


def _check_model(model: BaseTuner, adapter_names: Sequence[str]) -> None:
    """Check all that does not depend on the input, before the first layer runs."""
    # A string is a sequence of strings, too: its letters.
    is_list = not isinstance(adapter_names, str) and all(isinstance(name, str) for name in adapter_names)
    if not is_list:
        raise UserError(f"adapter_names is {adapter_names!r}; give a list with one adapter name per row of the batch")
    if model.training:
        raise UserError(
            "adapter_names is for inference: one batch cannot train several masks; call model.eval(), or train one "
            "adapter at a time after model.set_adapter(name)"
        )

    # Their layers get (T, B, I): each mask would be applied to a token's place instead of a row.
    model_type = getattr(getattr(model.model, "config", None), "model_type", None)
    if model_type in _TOKENS_FIRST:
        raise UserError(
            f"adapter_names has one mask per row, and layers of {model_type} get the tokens of all rows before the "
            "rows: run the rows of each adapter by themselves, after model.set_adapter(name)"
        )

    # MaskedLinear, by way of the model: importing layer.py here would be a circular import.
    layers = [module for module in model.modules() if isinstance(module, model.tuner_layer_cls)]
    masked = cast("list[MaskedLinear]", layers)

    # A layer may have some of the adapters only; a name that no layer has is likely to be misspelt.
    loaded: set[str] = set()
    for layer in masked:
        loaded.update(layer.mask_configs)
    # Each name once, in the order of the rows.
    asked = dict.fromkeys(name for name in adapter_names if name != BASE)
    for name in asked:
        if name not in loaded:
            hint = did_you_mean(name, loaded)
            known = ", ".join(sorted(loaded))
            raise UserError(
                f"adapter_names has {name!r}, which is not loaded{hint}; loaded: {known} (and {BASE} for no mask)"
            )

    for layer in masked:
        # Tokens of all rows are gathered for an expert, and nothing says which row each is of.
        if "experts" in layer.module_name.split(".") and any(name in layer.mask_configs for name in asked):
            raise UserError(
                f"adapter_names has one mask per row, and {layer.module_name} is an expert, whose rows are tokens of "
                "any row: run the rows of each adapter by themselves, after model.set_adapter(name)"
            )
        asked_here = [name for name in asked if name in layer.mask_configs]
        _check_layer(layer, asked_here)

    # A layer of LoRA beside or over a mask would apply its active adapter to all rows.
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, model.tuner_layer_cls):
            kind = type(module).__name__
            raise UserError(
                f"adapter_names mixes masks only, and {name} has an adapter of another kind ({kind}): merge that "
                "adapter into the base first"
            )


def _check_layer(layer: MaskedLinear, adapter_names: Sequence[str]) -> None:
    """Raise if a layer, or the mask of an adapter in it, cannot be a part of a mixed batch."""
    if layer.merged:
        merged = ", ".join(layer.merged_adapters)
        raise UserError(f"adapter_names needs the base weights, and {merged} is merged: call model.unmerge_adapter()")
    is_offloaded = layer.weight.device.type == "meta"
    is_sharded = hasattr(layer.weight, "full_tensor")  # a DTensor
    if is_offloaded or is_sharded:
        place = "offloaded" if is_offloaded else "sharded"
        raise UserError(
            f"adapter_names reads the base weights, and those of {layer.module_name} are {place}: load it whole, "
            "on one device"
        )
    for name in adapter_names:
        config = layer.mask_configs[name]
        if config.removed_value == "base":
            raise UserError(
                f"adapter {name!r} has removed_value='base' and cannot be in a mixed batch, whose masks remove to "
                "zero: run its rows by themselves, after model.set_adapter(name)"
            )
        if has_soft_gate(config) and name in layer.mask_scores:
            raise UserError(
                f"adapter {name!r} is trained with soft gates ({config.selection}) and cannot be in a mixed batch: "
                "save it, and load the saved mask"
            )


# The layer's side: each row is corrected for its mask


def check_rows(x: Tensor, adapter_names: Sequence[str]) -> None:
    """Raise unless ``adapter_names`` has one name for each row of ``x`` (B, ..., I)."""
    if len(x) != len(adapter_names):
        raise UserError(
            f"adapter_names has {len(adapter_names)} names and the batch {len(x)} rows; give one name per row"
        )


# Outside of compiled graphs: the plan depends on names, and its sparse matrix on the content of the masks.
@torch.compiler.disable
def mixed_batch_forward(
    layer: MaskedLinear,
    x: Tensor,
    adapter_names: Sequence[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Map x (B, ..., I) to (B, ..., O), each row with the mask named for it, or none.

    Args:
        layer: The masked layer; adapters that do not mask it leave their rows as the base computes them.
        x: Input.
        adapter_names: B names.
        *args: Passed on to the base layer.
        **kwargs: Passed on to the base layer.
    """
    check_rows(x, adapter_names)
    plan = _current_plan(layer, adapter_names)
    if plan is None:
        return layer.base_layer(x, *args, **kwargs)

    # x W^T, of all rows.
    rows = plan.rows
    x_rows = x if rows is None else x[rows]
    if plan.base_weight is None:
        y = layer.base_layer(x, *args, **kwargs)
    else:
        # A quantised layer may compute otherwise than with its dequantised weight (int8 rounds x too), from which a
        # mask alone removes.
        bias = layer.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        y_rows = F.linear(x_rows, plan.base_weight_in(x.dtype), bias)
        if rows is None:
            y = y_rows
        else:
            y = layer.base_layer(x, *args, **kwargs)
            y.index_copy_(0, rows, y_rows.to(y.dtype))

    # Minus x (W * R)^T, of the masked rows. Under autocast the base layer has rounded x and W; the correction has to
    # start from the same numbers.
    x_rows = x_rows.to(y.dtype)
    correction = _correction(plan, x_rows, num_outputs=y.shape[-1])
    # In place, as PEFT's LoRA adds: the base layer's output is fresh, and no backward pass needs it.
    if rows is None:
        return y.sub_(correction)
    return y.index_add_(0, rows, correction.to(y.dtype), alpha=-1)


def _correction(plan: BatchPlan, x: Tensor, num_outputs: int) -> Tensor:
    """Return x (W * R)^T of each row, float32 or float64; shape (B, ..., O).

    Args:
        plan: Its blocks belong to the rows of ``x``.
        x: Rows that have a mask, (B, ..., I).
        num_outputs: O.
    """
    num_rows = x.shape[0]
    num_inputs = x.shape[-1]
    values = plan.values_in(x.dtype)
    x_BTI = x.reshape(num_rows, -1, num_inputs).to(values.dtype)
    num_tokens = x_BTI.shape[1]

    if num_tokens == 1 and _has_sparse_product(values):
        # One token a row, as in decoding: the matrix times one long vector, all rows behind each other.
        product = plan.matrix_in(x.dtype) @ x_BTI.reshape(-1)
        y_BTO = product.view(num_rows, 1, num_outputs)
    else:
        # A sum of weighted rows of a table: the plain way is the sparse product above with a matrix on the right, for
        # which torch's kernel took ten times as long (16 rows of 64 tokens, 576 x 1536, one thread). The table has a
        # row for each input feature of each row of the batch; each "bag" is one output.
        table = x_BTI.transpose(1, 2).reshape(num_rows * num_inputs, num_tokens)
        sums = F.embedding_bag(
            plan.columns,
            table,
            plan.offsets,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        y_BTO = sums.view(num_rows, num_outputs, num_tokens).transpose(1, 2)
    return y_BTO.reshape(*x.shape[:-1], num_outputs)


def _has_sparse_product(values: Tensor) -> bool:
    """Whether torch has a fast product of a sparse matrix and a vector."""
    # It has one on a CPU through MKL alone. On GPUs nothing was measured, and one way is enough there.
    return values.device.type == "cpu" and torch.backends.mkl.is_available()


# A plan that is created inside torch.inference_mode() could not be used outside of it afterwards.
@torch.inference_mode(False)
@torch.no_grad()
def _current_plan(layer: MaskedLinear, adapter_names: Sequence[str]) -> BatchPlan | None:
    """The plan for these names; None: no row has a mask in this layer."""
    # An adapter that does not mask this layer leaves it as the base.
    names = tuple(name if name in layer.mask_configs else BASE for name in adapter_names)
    masks = {}
    for name in names:
        if name != BASE:
            masks[name] = layer.masker.mask_version(name)
    # Everything that a plan depends on.
    key = (names, masks, _version(layer.weight))
    cache = layer.mixed_batch
    if cache.plan is None or cache.plan[0] != key:
        cache.plan = None  # freed before the next one takes memory
        cache.plan = (key, _make_plan(layer, names, masks))
    return cache.plan[1]


def _make_plan(
    layer: MaskedLinear,
    names: Sequence[str],
    masks: dict[str, object],
) -> BatchPlan | None:
    """Build the block diagonal matrix of one batch.

    Args:
        layer: The masked layer.
        names: Adapter name of each row, or ``BASE``.
        masks: Adapter name -> version of its mask.
    """
    rows = [row for row, name in enumerate(names) if name != BASE]
    if not rows:
        return None

    weight = layer.get_base_weight()
    weight_OI = weight.t() if layer.is_transposed else weight
    num_outputs, num_inputs = weight_OI.shape
    # At least float32: the rounding of a long sum in bfloat16 would be larger than some corrections.
    dtype = torch.promote_types(weight.dtype, torch.float32)

    # One block for each adapter, however many rows it has: a compressed sparse row (CSR) matrix of shape (O, I).
    blocks = {}
    for name, version in masks.items():
        # Row and column of every place, from offsets and columns.
        places = _places(layer, name, version)
        counts = places.offsets.diff()
        rows_of_weight = torch.arange(num_outputs, device=weight.device)
        outputs = rows_of_weight.repeat_interleave(counts)
        inputs = places.columns.int()
        values_of_mask = weight_OI[outputs, inputs].to(dtype)
        blocks[name] = (places.offsets, inputs, values_of_mask)

    # The blocks of all rows, one below the other: each shifts the columns by I, and its offsets by the number of places
    # before it. All offsets but the first one are ends, which are the starts of the next rows.
    offsets = [torch.zeros(1, dtype=torch.int32, device=weight.device)]
    columns = []
    values = []
    num_places = 0
    for block, row in enumerate(rows):
        offsets_of_row, inputs, values_of_row = blocks[names[row]]
        offsets.append(offsets_of_row[1:] + num_places)
        columns.append(inputs + block * num_inputs)
        values.append(values_of_row)
        num_places += len(inputs)

    num_rows = len(rows)
    row_indices = None
    if num_rows < len(names):
        row_indices = torch.tensor(rows, device=weight.device)
    is_quantised = layer.quantization_backend is not None
    return BatchPlan(
        rows=row_indices,
        shape=(num_rows * num_outputs, num_rows * num_inputs),
        offsets=torch.cat(offsets),
        columns=torch.cat(columns),
        values={weight.dtype: torch.cat(values)},
        base_weight=weight if is_quantised else None,
    )


def _places(layer: MaskedLinear, name: str, version: object) -> Places:
    """Where the mask of an adapter removes weights; computed at its first use."""
    known = layer.mixed_batch.places.get(name)
    if known is not None:
        known_version, _, places = known
        if known_version == version:
            return places

    removed = ~layer.get_mask(name).to(layer.weight.device)
    if layer.is_transposed:
        removed = removed.t()

    # Each row ends where the next one begins; a 0 in front is the start of the first.
    counts = removed.sum(dim=1)
    ends = counts.cumsum(0)
    offsets = F.pad(ends, (1, 0)).to(torch.int32)

    # Two bytes a place where they suffice: places are kept as long as their adapter.
    num_inputs = removed.shape[1]
    fits_int16 = num_inputs <= torch.iinfo(torch.int16).max
    dtype = torch.int16 if fits_int16 else torch.int32
    columns = removed.nonzero()[:, 1].to(dtype)

    places = Places(offsets, columns)
    layer.mixed_batch.places[name] = (version, layer.saved_masks.get(name), places)
    return places


def _version(tensor: Tensor) -> tuple[object, ...]:
    """A value that is equal at two calls if the tensor is the same object with the same content."""
    # The address alone would not do: a freed tensor's is given to the next one. Tensors of torch.inference_mode() have
    # no count of writes.
    num_writes = 0 if tensor.is_inference() else tensor._version
    return (
        tensor.data_ptr(),
        tensor.device,
        tensor.dtype,
        num_writes,
        WeakIdRef(tensor),
    )
