"""The seam for saved adapters: how masks become tensors of a file and come back.

This is the plain way: the file holds the float32 scores, as PEFT's own methods save their trained parameters.
``maskft.masks`` replaces it by coded masks with checksums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from maskft_common.errors import UserError

if TYPE_CHECKING:
    from .config import MaskConfig

StateDict = dict[str, Tensor]
# A part of the names of trained parameters. A file leaves out the adapter's name behind it.
_SCORES = ".mask_scores"


class AdapterFiles:
    """How adapters are saved and loaded; the plain way.

    Attributes:
        loads_scores: Whether an adapter that is loaded for inference needs scores to load into.
    """

    loads_scores = True

    def encode(
        self,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: StateDict,
        of_peft: StateDict,
    ) -> StateDict:
        """Tensors to save for one adapter.

        Args:
            model: The wrapped model.
            config: Configuration of the adapter; it is saved after this call and may be filled in.
            adapter_name: The adapter.
            state_dict: State dict of the whole model, with scores gathered from all ranks; weights that PEFT would save
                beside the adapter may be removed.
            of_peft: The tensors that PEFT would save: the scores.

        Raises:
            UserError: If the adapter was loaded as a mask, so that it has no scores.
        """
        # PEFT would write a file without a mask, and say nothing.
        has_scores = any(_SCORES in name for name in of_peft)
        if not has_scores:
            raise UserError(
                f"adapter {adapter_name!r} has no scores to save; if it was loaded as a coded mask, call "
                "maskft.masks.enable() and save it so"
            )
        # The adapter may have been loaded from a file of coded masks, whose checksums are not those of this file.
        for checksum in ("mask_sha256", "base_fingerprint", "weights_sha256"):
            setattr(config, checksum, None)
        return of_peft

    def decode(
        self,
        model: nn.Module,
        config: MaskConfig,
        adapter_name: str,
        state_dict: StateDict,
        remap: Callable[[StateDict], StateDict],
    ) -> StateDict:
        """Check the tensors of a file, and return those that PEFT is to load by itself, by the names of the model.

        Args:
            model: The wrapped model.
            config: Configuration of the adapter.
            adapter_name: The adapter.
            state_dict: Tensors of the file.
            remap: PEFT's mapping from names of the file to names of the model.

        Raises:
            UserError: If the file has no scores: PEFT would keep the scores that the adapter began with.
        """
        has_scores = any(_SCORES in name for name in state_dict)
        if not has_scores:
            raise UserError(
                "the adapter file has no scores; if it holds coded masks, call maskft.masks.enable() and load it again"
            )
        return remap(state_dict)

    def save_config(
        self,
        config: MaskConfig,
        folder: Path,
        save: Callable[[], None],
    ) -> None:
        """Write ``adapter_config.json`` by calling ``save``, after PEFT has written the tensors."""
        save()


# One for the process, because PEFT loads and saves through class methods, which have no object to keep it.
_current = AdapterFiles()


def adapter_files() -> AdapterFiles:
    """How adapters are saved and loaded now."""
    return _current


def set_adapter_files(files: AdapterFiles) -> AdapterFiles:
    """Save and load adapters with ``files``; returns the object used before, to set it again."""
    global _current
    before = _current
    _current = files
    return before
