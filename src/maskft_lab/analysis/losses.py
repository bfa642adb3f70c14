"""Tokenised rows for analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import load_from_disk
from torch import Tensor, nn

from maskft.data.tokenizing import IGNORED
from maskft.loss import pad
from maskft_common.errors import UserError, first_line
from maskft_common.layout import PREPARED

SPLITS = ("train", "heldout")
Batch = tuple[Tensor, Tensor]  # input_ids and labels, (rows, tokens), int64


class Sampling(NamedTuple):
    """How losses are measured: rows of one forward pass, the device, and the seed of all random draws."""

    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


def rows_folder(study: Path, given: Path | None) -> Path:
    """The folder of tokenised rows that was named, or the only one of a study.

    Raises:
        UserError: If there is none, or a study has several.
    """
    if given is not None:
        found = [given]
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

    Raises:
        UserError: If a split is not a data set of tokenised rows, or no row that was drawn has a loss.
    """
    out = {}
    for split in SPLITS:
        try:
            rows = _draw(folder / split, num_rows, seed)
        except Exception as error:
            # datasets raises errors of many types for files of another structure.
            raise UserError(
                f"{str(folder / split)!r} cannot be read as tokenised rows ({first_line(error)}): name another folder "
                "with --rows, or prepare the rows again"
            ) from error
        if not any(_has_loss(row) for row in rows):
            raise UserError(
                f"none of the {len(rows)} rows from {str(folder / split)!r} has a label with a loss: take more "
                "--num_rows, or name another folder with --rows"
            )
        out[split] = rows
    return out


def _draw(
    folder: Path,
    num_rows: int,
    seed: int,
) -> list[dict]:
    """Draw rows of one split; see `load_rows`."""
    data = load_from_disk(str(folder))
    if len(data) == 0:
        raise ValueError("it has no rows")
    # Other columns, such as texts, would be copied into memory below.
    data = data.select_columns(["input_ids", "labels"])
    # A generator for each split: the rows of one do not depend on how many the other has.
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(data), generator=generator)
    drawn = shuffled[:num_rows]
    # Which rows is random, their order is that of the data set.
    in_order = drawn.sort().values.tolist()
    rows = data.select(in_order).to_list()
    for row in rows:
        # A text, or numbers that are not whole, raise here.
        ids = torch.tensor(row["input_ids"])
        labels = torch.tensor(row["labels"])
        is_whole = ids.dtype == labels.dtype == torch.int64
        if not is_whole or ids.dim() != 1 or ids.shape != labels.shape:
            raise ValueError("input_ids and labels are not two lists of whole numbers, of one length")
    return rows


def _has_loss(row: Mapping) -> bool:
    # The first token has no prediction, so its label counts for nothing.
    return any(label != IGNORED for label in row["labels"][1:])


def check_ids(rows: Sequence[Mapping], model: nn.Module) -> None:
    """Raise for tokens that a model does not have: the rows are then of another tokenizer."""
    # The size of the embedding; the tokenizer may have fewer tokens.
    num_tokens = model.get_input_embeddings().weight.shape[0]
    for row in rows:
        labels = [label for label in row["labels"] if label != IGNORED]
        for token_id in (*row["input_ids"], *labels):
            if not 0 <= token_id < num_tokens:
                raise UserError(
                    f"a row has the token id {token_id}, and the model has {num_tokens} tokens: name rows of its own "
                    "tokenizer with --rows"
                )


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
