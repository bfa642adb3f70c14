"""The engine behind vLLM's weight transfer backend ``maskft``; imported by vLLM only, see ``vllm_plugin``.

One update names one mask: ``{"patch": FILE_OR_ADAPTER_FOLDER}`` puts it over the base, ``{"patch": null}`` gives the
base back, bit for bit. A mask that is there is taken off first, so that masks never lie over one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from maskft_base.errors import UserError

from .patch import Patch, Undo, read_patch, undo_patch


@dataclass
class MaskInitInfo(WeightTransferInitInfo):
    """Nothing has to be set up: there is no trainer to connect to."""


@dataclass
class MaskUpdateInfo(WeightTransferUpdateInfo):
    """What to put over the base.

    Attributes:
        patch: A patch file or an adapter folder, on a disk that every worker reads; None: the base alone.
    """

    patch: str | None = None


class MaskEngine(WeightTransferEngine[MaskInitInfo, MaskUpdateInfo]):
    """Applies masks through the model's own weight loader, which knows packed matrices and tensor parallel shards."""

    init_info_cls = MaskInitInfo
    update_info_cls = MaskUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._undo: list[Undo] = []

    def init_transfer_engine(self, init_info: MaskInitInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Do nothing: weights are changed in place, no layer is loaded again."""

    def finish_weight_update(self) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""

    def receive_weights(self, update_info: MaskUpdateInfo) -> None:
        """Take off the mask that is there, and put on the one that is named; after an error the base is bare."""
        patch = None if update_info.patch is None else read_patch(update_info.patch)
        self._take_off()
        if patch is None:
            return
        try:
            for part in by_layer(patch):
                self._put_on(part)
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        weights = dict(self.model.named_parameters())
        while self._undo:
            undo_patch(weights, self._undo.pop())

    @torch.no_grad()
    def _put_on(self, patch: Patch) -> None:
        """One decoder layer: what the loader changes is found by comparing, so that no layout has to be known."""
        layer = layer_of(next(iter(patch.indices)))
        before = {
            name: weight.detach().clone()
            for name, weight in self.model.named_parameters()
            if layer_of(name) == layer and weight.is_floating_point()
        }
        dtype = self.model_config.dtype
        zeros = {name: torch.zeros(places.numel(), dtype=dtype) for name, places in patch.indices.items()}
        patches = [
            CheckpointWeightPatch(name, patch.shapes[name], dtype, zeros[name].to(self.device), places.to(self.device))
            for name, places in patch.indices.items()
        ]
        try:
            load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)
        finally:
            changes = changed(dict(self.model.named_parameters()), before)
            self._undo.append(changes)
        if not changes and self.parallel_config.world_size == 1 and patch.num_removed:
            raise UserError(f"vLLM's loader changed no weight of {', '.join(patch.indices)}; is it the mask's base?")
        weights = dict(self.model.named_parameters())
        for name, (places, _) in changes.items():
            if bool(weights[name].detach().take(places.to(self.device)).count_nonzero()):
                raise UserError(f"vLLM's loader wrote something else than zeros into {name}; the mask was taken off")


def by_layer(patch: Patch) -> Iterator[Patch]:
    """The patch in pieces of one decoder layer, so that no more than a layer is copied at a time."""
    layers: dict[str | None, list[str]] = {}
    for name in patch.indices:
        layers.setdefault(layer_of(name), []).append(name)
    for names in layers.values():
        yield Patch({name: patch.indices[name] for name in names}, {name: patch.shapes[name] for name in names})


def layer_of(name: str) -> str | None:
    """The first number in a weight's name, which checkpoint and server share; None outside the layers."""
    return next((part for part in name.split(".") if part.isdigit()), None)


def changed(weights: dict[str, Tensor], before: dict[str, Tensor]) -> Undo:
    """Where weights are not bit for bit what they were, and what was there."""
    undo: Undo = {}
    for name, old in before.items():
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
        different = weights[name].detach().contiguous().view(bits) != old.contiguous().view(bits)
        places = different.view(-1).nonzero().view(-1)
        if places.numel():
            undo[name] = places.cpu(), old.take(places).cpu()
    return undo
