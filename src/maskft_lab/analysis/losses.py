"""Tokenised rows for analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import load_from_disk
from torch import Tensor

from maskft.data.tokenizing import IGNORED
from maskft.loss import pad
from maskft_common.errors import UserError
from maskft_common.layout import PREPARED

SPLITS = ("train", "heldout")
Batch = tuple[Tensor, Tensor]  # input_ids and labels, (rows, tokens), int64


class Sampling(NamedTuple):
    """How losses are measured: rows of one forward pass, the device, and the seed of all random draws."""

    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


def rows_folder(study: Path, given: str | None) -> Path:
    """The folder of tokenised rows that was named, or the only one of a study.

    Raises:
        UserError: If there is none, or a study has several.
    """
    if given:
        found = [Path(given)]
    else:
        # prepared/DIGEST/SPLIT, the digest of the data's settings: runs with other data have a folder beside it.
        first_split = SPLITS[0]
        folders = (study / PREPARED).glob(f"*/{first_split}")
        found = sorted(folder.parent for folder in folders)

    # A folder that was named has to hold both splits, too.
    is_complete = False
    if len(found) == 1:
        folders_of_splits = [found[0] / split for split in SPLITS]
        is_complete = all(folder.is_dir() for folder in folders_of_splits)
    if not is_complete:
        names = ", ".join(str(folder) for folder in found) or "none"
        raise UserError(
            f"losses need one folder with tokenised rows ({' and '.join(SPLITS)}), got {names}: name it with --rows; "
            "`maskft train ... --prepare_only --prepared_data_dir DIR` makes one"
        )
    return found[0]


def load_rows(
    folder: Path,
    num_rows: int,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """Draw rows of both splits, the same for every model.

    Args:
        folder: Data sets ``train`` and ``heldout`` as ``maskft train`` prepares them.
        num_rows: Rows of each split, drawn without replacement; all where there are fewer.
        seed: Of the draw.

    Returns:
        Split -> rows with ``input_ids`` and ``labels`` (-100 where there is no loss).
    """
    out = {}
    for split in SPLITS:
        data = load_from_disk(str(folder / split))
        # Other columns, such as texts, would be copied into memory below.
        data = data.select_columns(["input_ids", "labels"])
        # A generator for each split: the rows of one do not depend on how many the other has.
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(data), generator=generator)
        drawn = shuffled[:num_rows]
        # Which rows is random, their order is that of the data set.
        in_order = drawn.sort().values.tolist()
        out[split] = data.select(in_order).to_list()
    return out


def make_batches(
    rows: Sequence[Mapping],
    batch_size: int,
    device: str | torch.device = "cpu",
) -> list[Batch]:
    """Batches of rows in their order, padded on the right: a causal model never sees the padding.

    Not sorted by length: the spread between batches tells the error of a mean over rows.
    """
    # The attention mask of `pad` is not needed: the labels of padding are ignored, and nothing attends to it.
    batches: list[Batch] = []
    for start in range(0, len(rows), batch_size):
        # The last batch may be smaller.
        batch = rows[start : start + batch_size]
        ids = [row["input_ids"] for row in batch]
        labels = [row["labels"] for row in batch]
        ids_BT, _ = pad(ids, 0, device)
        labels_BT, _ = pad(labels, IGNORED, device)
        batches.append((ids_BT, labels_BT))
    return batches
