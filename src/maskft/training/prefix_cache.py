"""Outputs of the frozen layers below the first trained one, computed once and kept on disk.

What a token sequence looks like after frozen layers depends on its tokens alone, so a row is found by them, in any
later epoch and in any later run with the same base model and the same first trained layer. Kept in bfloat16: exact for
a bfloat16 model, rounded for a float32 one. A batch of which a row is not known, or whose file is damaged, runs
through the layers as usual.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import Tensor, nn
from trl import SFTTrainer

from maskft_base.errors import UserError
from maskft_base.files import digest, digest_tensors

from .method_arguments import MethodArguments

_CHECKSUM_BYTES = 4  # crc32, at the end of every file


class PrefixCache:
    """Wraps the prefix of a model; :meth:`remove` undoes it.

    Args:
        model: A causal language model, possibly with adapters; what is trained must be marked ``requires_grad``.
        folder: Where the outputs are kept; may hold those of other runs and models.
        max_bytes: Bound on what is kept for this model; rows beyond it are computed every time.
        compute_dtype: Dtype of autocast, or None without it; outputs of different dtypes are kept apart.

    A row is a file, which is there whole or not at all, so that runs may share a folder and may be killed.

    Raises:
        UserError: If the prefix is not frozen or has dropout.
    """

    def __init__(self, model: nn.Module, folder: str | Path, max_bytes: float, compute_dtype: torch.dtype | None):
        self.decoder, self.layers = _frozen_prefix(model)
        self.max_bytes, self.num_hits, self.num_rows = max_bytes, 0, 0
        self._rows: list[tuple[str, int]] = []
        self._hidden_BTD: Tensor | None = None
        # Whether a layer returns a tuple is seen when the prefix runs first; until then no row is taken from here.
        self._returns_tuple: bool | None = None
        self._folder = Path(folder) / _fingerprint(self.decoder, self.layers, compute_dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self._folder) if "." not in entry.name}
        self._known, self.num_bytes = set(sizes), sum(sizes.values())
        self._width = self.decoder.get_input_embeddings().weight.shape[1]
        self._forwards = [layer.forward for layer in self.layers]
        for position, layer in enumerate(self.layers):
            layer.forward = self._wrapped(position)
        self._hook = self.decoder.register_forward_pre_hook(self._before_batch, with_kwargs=True)

    @property
    def bytes_per_token(self) -> int:
        """Bytes kept of each token."""
        return 2 * self._width

    def summary(self) -> str:
        """What it kept and how often it helped."""
        share = self.num_hits / max(self.num_rows, 1)
        full = "" if self.num_bytes + 2**20 < self.max_bytes else "; it is full, raise mask_prefix_cache_gb"
        return f"prefix cache: {share:.0%} of rows came from it, {self.num_bytes / 1e9:.2f} GB kept{full}"

    def remove(self) -> None:
        """Let the layers run as before."""
        self._hook.remove()
        for layer in self.layers:
            del layer.forward

    def _before_batch(self, module, args, kwargs) -> None:
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        self._rows = _row_files(ids_BT, kwargs.get("attention_mask"))
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") or not self._rows:
            self._rows, self._hidden_BTD = [], None
            return
        self.num_rows += len(self._rows)
        known = self._returns_tuple is not None and self._known.issuperset(name for name, _ in self._rows)
        self._hidden_BTD = self._read(ids_BT) if known else None
        self.num_hits += len(self._rows) * (self._hidden_BTD is not None)

    def _wrapped(self, position: int):
        forward, last = self._forwards[position], position == len(self.layers) - 1

        def run(hidden_BTD: Tensor, *args, **kwargs):
            if self._hidden_BTD is not None:
                hidden_BTD = self._hidden_BTD.to(hidden_BTD.dtype) if position == 0 else hidden_BTD
                return (hidden_BTD,) if self._returns_tuple else hidden_BTD
            out = forward(hidden_BTD, *args, **kwargs)
            if not last or not self._rows:
                return out
            self._returns_tuple = isinstance(out, tuple)
            hidden_BTD, *rest = out if self._returns_tuple else (out,)
            rounded_BTD = hidden_BTD.detach().to(torch.bfloat16)
            self._write(rounded_BTD)
            # Rounded the first time too: no loss depends on what an earlier run has left in the cache.
            hidden_BTD = rounded_BTD.to(hidden_BTD.dtype)
            return (hidden_BTD, *rest) if self._returns_tuple else hidden_BTD

        return run

    def _read(self, ids_BT: Tensor) -> Tensor | None:
        """The kept outputs of the batch; None if a row is damaged, which is then computed and written again."""
        hidden_BTD = torch.zeros(*ids_BT.shape, self._width, dtype=torch.bfloat16)
        for row, (name, length) in enumerate(self._rows):
            data = _checked(self._folder / name, length * self.bytes_per_token)
            if data is None:
                self._known.discard(name)
                return None
            hidden_BTD[row, :length] = torch.frombuffer(data, dtype=torch.bfloat16).view(length, self._width)
        return hidden_BTD.to(ids_BT.device)

    def _write(self, hidden_BTD: Tensor) -> None:
        for row_TD, (name, length) in zip(hidden_BTD.cpu(), self._rows, strict=True):
            size = length * self.bytes_per_token + _CHECKSUM_BYTES
            if name in self._known or self.num_bytes + size > self.max_bytes:
                continue
            partial = self._folder / f"{name}.{os.getpid()}"
            data = row_TD[:length].contiguous().view(torch.int16).numpy().tobytes()
            partial.write_bytes(data + _checksum(data))
            partial.replace(self._folder / name)
            self._known.add(name)
            self.num_bytes += size


def _checksum(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")


def _checked(file: Path, num_bytes: int) -> bytearray | None:
    """Content of a file without its checksum; None if it is not what was written."""
    try:
        content = bytearray(file.read_bytes())
    except OSError:
        return None
    data, checksum = content[:num_bytes], content[num_bytes:]
    return data if len(data) == num_bytes and checksum == _checksum(data) else None


@contextmanager
def cached_prefix(trainer: SFTTrainer, method: MethodArguments, console: Console) -> Iterator[None]:
    """Train inside: with the prefix cache that ``method`` asks for, if it does."""
    if method.mask_prefix_cache is None:
        yield
        return
    args = trainer.args
    _check_fits(trainer)
    folder = Path(method.mask_prefix_cache)
    if args.world_size > 1:
        folder = folder / f"rank-{args.process_index}-of-{args.world_size}"
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    cache = PrefixCache(trainer.model, folder, method.mask_prefix_cache_gb * 1e9, compute_dtype)
    tokens = sum(len(ids) for rows in (trainer.train_dataset, trainer.eval_dataset) for ids in rows["input_ids"])
    console.print(
        f"prefix cache: {len(cache.layers)} frozen layers, {cache.num_bytes / 1e9:.2f} GB kept already, at most "
        f"{tokens * cache.bytes_per_token / 1e9:.2f} GB for this data (bound {method.mask_prefix_cache_gb:g} GB)",
        highlight=False,
    )
    try:
        yield
    finally:
        console.print(cache.summary(), highlight=False)
        cache.remove()


def _check_fits(trainer: SFTTrainer) -> None:
    args = trainer.args
    if args.packing or args.padding_free:
        raise UserError(
            "mask_prefix_cache keeps one sequence per row: set packing and padding_free to false, or drop it"
        )
    if args.gradient_checkpointing and args.is_reentrant:
        raise UserError(
            "mask_prefix_cache needs a prefix without gradient, and reentrant checkpointing sends one through it: set "
            "use_reentrant to false"
        )
    if trainer.is_fsdp_enabled:
        raise UserError("mask_prefix_cache needs whole layers on every process, FSDP splits them: drop one of the two")


def _frozen_prefix(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder, and its layers below the first that is trained."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    decoder = model.get_decoder()
    layers = _layers(decoder)
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    if not any(trained) or trained[0]:
        which = "no layer is trained" if not any(trained) else "layer 0 is trained, so that no frozen layer is below it"
        raise UserError(f"mask_prefix_cache has nothing to keep: {which}; drop it or set mask_layers_to_transform")
    for name, parameter in _outside_layers(decoder, layers):
        if parameter.requires_grad:
            raise UserError(f"mask_prefix_cache needs a frozen prefix, but {name} is trained; drop one of the two")
    prefix = layers[: trained.index(True)]
    for layer in prefix:
        if any(isinstance(module, BaseTunerLayer) for module in layer.modules()):
            raise UserError("mask_prefix_cache needs a prefix without adapters; it has frozen ones")
    rates = {name: value for name, value in decoder.config.to_dict().items() if _is_dropout(name, value)}
    if rates:
        name, rate = next(iter(rates.items()))
        raise UserError(f"mask_prefix_cache needs a model without dropout, but {name} is {rate}; set it to 0")
    return decoder, prefix


def _layers(decoder: nn.Module) -> list[nn.Module]:
    stacks = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(stacks) != 1:
        raise UserError(f"mask_prefix_cache does not know where the layers of {type(decoder).__name__} are; drop it")
    return list(stacks[0])


def _outside_layers(decoder: nn.Module, layers: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Embeddings and norms; that of the last norm does no harm."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [(name, p) for name, p in decoder.named_parameters() if id(p) not in inside]


def _is_dropout(name: str, value) -> bool:
    return name.endswith(("dropout", "pdrop", "layerdrop")) and isinstance(value, float) and value > 0


def _fingerprint(decoder: nn.Module, prefix: list[nn.Module], compute_dtype: torch.dtype | None) -> str:
    """Of everything that decides the outputs: configuration, weights, dtype of computation."""
    parameters = [p for _, p in _outside_layers(decoder, _layers(decoder))]
    parameters += [p for layer in prefix for p in layer.parameters()]
    weights = digest_tensors((str(parameter.dtype), parameter) for parameter in parameters)
    made_with = ["crc32", type(decoder).__name__, len(prefix), str(compute_dtype), decoder.config.to_diff_dict()]
    return digest([*made_with, weights])[:24]


def _row_files(ids_BT: Tensor | None, mask_BT: Tensor | None) -> list[tuple[str, int]]:
    """The name of every row, a digest of its tokens, and its length; none if rows are not padded on the right."""
    if ids_BT is None:
        return []
    lengths = [ids_BT.shape[1]] * len(ids_BT)
    if mask_BT is not None:
        if mask_BT.dim() != 2 or bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any()):
            return []
        lengths = mask_BT.sum(1).tolist()
    rows = ids_BT.cpu().to(torch.int64)
    return [(digest(row[:length].numpy().tobytes())[:40], length) for row, length in zip(rows, lengths, strict=True)]
