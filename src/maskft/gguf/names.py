"""Which tensor of a GGUF file holds the weight of a module, and in which order its rows are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskft_common.errors import UserError, install_hint

from .header import GgufHead, TensorPlace
from .zero_codes import why_no_zero

if TYPE_CHECKING:
    from gguf import TensorNameMap

# llama.cpp's converter permutes the rows of queries and keys of these (see to_file_order); the rest lies as in
# transformers.
PERMUTED = ("llama", "mistral3")
_AS_IN_TRANSFORMERS = (
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "qwen2",
    "qwen3",
)
ARCHITECTURES = (*PERMUTED, *_AS_IN_TRANSFORMERS)
# Most decoder layers of a file: gguf builds a table of names for each, and a damaged file may claim billions.
_MAX_BLOCKS = 2_000
# Part of a tensor's name -> the metadata key of its number of heads, behind "ARCHITECTURE.attention.".
_HEADS = {
    "attn_q": "head_count",
    "attn_k": "head_count_kv",
}
# Part of a tensor's name -> the tensor that some converters fuse it into.
_FUSED = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
    "ffn_gate": "ffn_up",
}


def find_tensors(head: GgufHead, modules: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Names of the tensors that hold the weights of modules, checked: there, of this shape, with a zero level.

    Args:
        head: Head of the file.
        modules: Module name, as in transformers -> shape of its weight (out_features, in_features).

    Returns:
        Module name -> name of its tensor.

    Raises:
        UserError: For the first that does not fit.
    """
    names = _tensor_names(head, modules)
    for module, shape in modules.items():
        # From the cause to the detail: the tensor is there, it is of this model, a mask can be written into it.
        tensor = names[module]
        if tensor not in head.tensors:
            raise UserError(f"{str(head.path)!r} has no {tensor} for {module}{_why_missing(head, tensor)}")
        place = head.tensors[tensor]
        if place.shape != tuple(shape):
            raise UserError(
                f"{str(head.path)!r} is a file of another model: {tensor} has shape {place.shape}, the mask of "
                f"{module} {tuple(shape)}"
            )
        reason = why_no_zero(tensor, place.kind)
        if reason is not None:
            raise UserError(f"{str(head.path)!r}: {reason}")
    return names


def _name_map(head: GgufHead) -> TensorNameMap:
    """llama.cpp's table of names for the architecture and the number of layers of a file.

    Raises:
        UserError: If the file is of no known architecture, is damaged, or gguf is not installed.
    """
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        raise UserError(f"names of a GGUF file need gguf ({install_hint('gguf')}): {error}") from error

    architecture = head.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{str(head.path)!r} holds a {architecture!r} model; maskft knows the order of weights in "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    # gguf's table of names depends on the architecture, by its number there, and on the number of layers.
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        raise UserError(
            f"{str(head.path)!r} holds a {architecture!r} model, which the installed gguf does not know; update gguf"
        )
    num_blocks = head.metadata.get(f"{architecture}.block_count")
    if not isinstance(num_blocks, int) or not 0 < num_blocks <= _MAX_BLOCKS:
        raise UserError(
            f"{str(head.path)!r} is damaged: {architecture}.block_count is {num_blocks}, and must be a number of layers"
        )
    return get_tensor_name_map(numbers[architecture], num_blocks)


def _tensor_names(head: GgufHead, modules: Iterable[str]) -> dict[str, str]:
    """Names of the tensors of modules, by the tables of llama.cpp's Python package; not looked up in the file."""
    known = _name_map(head)

    # Two modules in one tensor (fused projections) cannot be masked apart.
    names = {}
    modules_of: dict[str, str] = {}
    for module in modules:
        # gguf maps names of modules; their tensors end in ".weight". Of a vision-language model it knows the decoder's
        # without a part that transformers gives them.
        of_decoder = module.replace("language_model.", "")
        name = known.get_name(of_decoder)
        if name is None:
            architecture = head.metadata["general.architecture"]
            num_blocks = head.metadata[f"{architecture}.block_count"]
            raise UserError(
                f"{str(head.path)!r} is a file of another model: {module} has no place in a {architecture} of "
                f"{num_blocks} layers"
            )
        tensor = f"{name}.weight"
        if tensor in modules_of:
            raise UserError(f"{modules_of[tensor]} and {module} are one tensor, {tensor}, of {str(head.path)!r}")
        modules_of[tensor] = module
        names[module] = tensor
    return names


def names_of_tensors(head: GgufHead, parameters: Iterable[str]) -> dict[str, str]:
    """Names of the tensors that hold parameters of a model, where llama.cpp has one; not looked up in the file.

    Args:
        head: Head of the file.
        parameters: Names as in transformers, such as ``model.layers.3.self_attn.q_proj.bias``.

    Returns:
        Name of a parameter -> name of its tensor.
    """
    known = _name_map(head)
    names = {}
    for parameter in parameters:
        # gguf maps names of modules; a tensor has the same last part.
        module, _, kind = parameter.rpartition(".")
        name = known.get_name(module)
        if name is not None:
            names[parameter] = f"{name}.{kind}"
    return names


def _why_missing(head: GgufHead, tensor: str) -> str:
    """The likely reason why a file does not have a tensor, to follow a message."""
    block, _, part = tensor.removesuffix(".weight").rpartition(".")  # blk.3 and attn_q of blk.3.attn_q.weight
    fused = _FUSED.get(part)
    if fused is not None and f"{block}.{fused}.weight" in head.tensors:
        return f": the file holds it fused in {block}.{fused}; convert the model without fusing, or mask other layers"
    if tensor == "output.weight":
        return ": its output is tied to the embeddings; mask other layers"
    return ": it is a file of another model"


def to_file_order(head: GgufHead, tensor: str, matrix: Tensor) -> Tensor:
    """Rows of a weight or a mask, in transformers' order, as the file has them.

    Rotary positions turn pairs of values. Transformers pairs value i with value i + half of a head; llama.cpp's files
    of llamas have the two side by side.
    """
    num_heads = _heads(head, tensor)
    if num_heads is None:
        return matrix
    # Rows by (head, which of the pair, pair) become rows by (head, pair, which of the pair).
    num_columns = matrix.shape[1]
    pairs = matrix.reshape(num_heads, 2, -1, num_columns)
    swapped = pairs.transpose(1, 2)
    return swapped.reshape(matrix.shape)


def from_file_order(head: GgufHead, tensor: str, matrix: Tensor) -> Tensor:
    """The inverse of :func:`to_file_order`."""
    num_heads = _heads(head, tensor)
    if num_heads is None:
        return matrix
    # Rows by (head, pair, which of the pair) become rows by (head, which of the pair, pair).
    num_columns = matrix.shape[1]
    pairs = matrix.reshape(num_heads, -1, 2, num_columns)
    swapped = pairs.transpose(1, 2)
    return swapped.reshape(matrix.shape)


def _heads(head: GgufHead, tensor: str) -> int | None:
    """Number of heads of a tensor whose rows the file has in another order; None: they have transformers' order."""
    architecture = head.metadata["general.architecture"]
    part = tensor.removesuffix(".weight").rpartition(".")[2]  # attn_q of blk.3.attn_q.weight
    if architecture not in PERMUTED or part not in _HEADS:
        return None

    # With grouped-query attention there are fewer heads of keys than of queries.
    key = f"{architecture}.attention.{_HEADS[part]}"
    # A model without groups of heads need not name the number of its keys' heads.
    num_query_heads = head.metadata.get(f"{architecture}.attention.head_count")
    value = head.metadata.get(key, num_query_heads)

    # A head has an even number of rows, as its values are paired.
    num_rows = head.tensors[tensor].shape[0]
    is_number = isinstance(value, int) and value >= 1
    is_valid = is_number and num_rows % (2 * value) == 0
    if not is_valid:
        raise UserError(f"{str(head.path)!r}: {key} is {value}, which does not divide the rows of {tensor} into heads")
    return value


def dequantised(head: GgufHead, tensor: str) -> Tensor:
    """Values of a tensor in transformers' order, float32, one tensor in memory."""
    import numpy as np

    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    place: TensorPlace = head.tensors[tensor]
    quantization = GGMLQuantizationType(place.kind)
    # Not place.num_bytes, which is not known of types that are newer than our table.
    block_size, block_bytes = GGML_QUANT_SIZES[quantization]
    num_blocks = math.prod(place.shape) // block_size
    num_bytes = num_blocks * block_bytes
    # One tensor's bytes alone: the whole model as floats may not fit into memory.
    raw = np.fromfile(
        head.path,
        dtype=np.uint8,
        count=num_bytes,
        offset=place.start,
    )
    # As rows, of which gguf computes some at a time: of one long row it would hold every step in memory.
    rows = raw.reshape(*place.shape[:-1], -1)
    values = dequantize(rows, quantization).reshape(place.shape)
    matrix = torch.from_numpy(values)
    return from_file_order(head, tensor, matrix).contiguous()
