"""Tokenised rows for analyses, and the loss of a model on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from torch import Tensor
from transformers import AutoModelForCausalLM

from maskft.data import IGNORED
from maskft.data.prepared import REPORT
from maskft.models import load_config
from maskft_base.errors import UserError
from maskft_base.files import PREPARED, read_json

SPLITS = ("train", "heldout")
Batch = tuple[Tensor, Tensor]  # input_ids and labels, (rows, tokens), int64


class Sampling(NamedTuple):
    """How losses are taken: rows of one forward pass, the device, and the seed of what is drawn at random."""

    batch_size: int = 8
    device: str = "cpu"
    seed: int = 0


def rows_folder(study: Path, given: str | None, data: Mapping) -> Path:
    """The folder of tokenised rows that was named, or the only one of a study, or the one a run was trained on.

    Args:
        study: The study's folder.
        given: The folder that was named; None: that of the study.
        data: How that run's rows were counted, ``data`` of its ``training.json``; it tells folders of a study apart.

    Raises:
        UserError: If there is none, or a study has several that this does not tell apart.
    """
    found = [Path(given)] if given else sorted(path.parent for path in (study / PREPARED).glob(f"*/{SPLITS[0]}"))
    if len(found) > 1:
        found = [path for path in found if (path / REPORT).is_file() and read_json(path / REPORT)["counts"] == data]
    if len(found) != 1 or not all((found[0] / split).is_dir() for split in SPLITS):
        names = ", ".join(map(str, found)) or "none that this mask was trained on"
        raise UserError(
            f"losses need one folder with tokenised rows ({' and '.join(SPLITS)}), got {names}: name it with --rows; "
            "`maskft train ... --prepare_only --prepared_data_dir DIR` makes one"
        )
    return found[0]


def load_rows(folder: Path, num_rows: int, seed: int = 0) -> dict[str, list[dict]]:
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
        data = load_from_disk(str(folder / split)).select_columns(["input_ids", "labels"])
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:num_rows]
        out[split] = data.select(order.sort().values.tolist()).to_list()
    return out


def make_batches(rows: Sequence[Mapping], batch_size: int, device: str | torch.device = "cpu") -> list[Batch]:
    """Batches of rows of similar length, padded on the right: a causal model never sees the padding."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    out = []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        length = len(part[-1]["input_ids"])
        padded = [
            [list(row[key]) + [value] * (length - len(row[key])) for row in part]
            for key, value in (("input_ids", 0), ("labels", IGNORED))
        ]
        out.append((torch.tensor(padded[0], device=device), torch.tensor(padded[1], device=device)))
    return out


def num_targets(batch: Batch) -> int:
    """Number of tokens of a batch that have a loss."""
    return int((batch[1][:, 1:] != IGNORED).sum())


def loss_sum(model, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihood of a batch's supervised tokens, in nats; a scalar with a gradient."""
    logits_BTV = model(input_ids=batch[0], use_cache=False).logits[:, :-1]
    targets = batch[1][:, 1:].flatten()
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def mean_loss(model, batches: Iterable[Batch]) -> float:
    """Mean negative log-likelihood over all supervised tokens of the batches, in nats per token."""
    sums = [(float(loss_sum(model, batch)), num_targets(batch)) for batch in batches]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def count_parameters(source: str) -> tuple[int, int]:
    """Number of parameters of a model (tied ones once) and size of its vocabulary, without loading its weights."""
    config = load_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters()), config.get_text_config().vocab_size


def check_room(need_bytes: float, device: str, what: str, remedy: str) -> None:
    """Refuse what has no room in the free memory of a device, before it is begun; ``remedy`` says what to do."""
    is_gpu = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_gpu else psutil.virtual_memory().available
    if need_bytes > free:
        raise UserError(f"{what} needs about {need_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {remedy}")
