"""Never worse: the trained mask against its unmasked parent, on held-out rows, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft.utils import ModulesToSaveWrapper
from pydantic import ConfigDict

from maskft_base import files, runtime
from maskft_base.errors import UserError
from maskft_base.files import FileModel, digest, read_json, read_model
from maskft_lab.evaluation.heldout import nll_per_item
from maskft_lab.results.differences import Measured, Sample
from maskft_lab.results.schema import cluster_ids

from ..data.prepared import Prepared
from ..tuner import MaskConfig, adapter_layers
from .arguments import TrainConfig, TrainingArguments
from .method_arguments import ADAPTER, BUDGETS, OBJECTIVES, MethodArguments
from .trainer import MaskTrainer

MIN_ROWS = 2  # of a paired interval
# What an adapter that removes nothing still says: which layers it is for, and of which model.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_IDENTITY = ("mask_seed", "verify_base", "format_version", "base_fingerprint", "mask_sha256", "trainable_token_indices")

RowLosses = list[tuple[float, int]]  # per row: nats per supervised token, and number of these tokens


class HeldoutLosses(FileModel):
    """Content of ``heldout.json``: losses row by row, so that runs on the same rows can be compared in pairs.

    Attributes:
        ids: Ids of the rows, in the order of the lists below.
        num_tokens: Supervised tokens of each row.
        nll: Loss of each row under the best checkpoint, in nats per token; of a mask also where it was not kept.
        parent_nll: Loss without the adapter; None for full fine-tuning, which leaves no parent behind.
        chose_sparsity: Ids of the rows that chose the mask's size, see ``mask_sparsity_auto``.
        clusters: ``cluster_id`` of each row: rows of one label (questions on one passage) depend on each other; None
            where they have none.
        objective: What was trained for. Of dpo the losses are in nats per pair, of grpo 1 for a wrong answer and 0 for
            a right one, and each row counts as one token.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    ids: list[str]
    num_tokens: list[int]
    nll: list[float]
    parent_nll: list[float] | None = None
    chose_sparsity: list[str] = []
    clusters: list[str] | None = None
    objective: str = "sft"


class Budget(FileModel):
    """One size of the mask that ``mask_sparsity_auto`` measured."""

    sparsity: float  # fraction removed, in [0, 1)
    nll: float | None  # nats per token on the rows that choose; None: not finite


class Verdict(FileModel):
    """The mask minus its parent on held-out rows, in the unit of its objective: below 0 the mask is better.

    Attributes:
        difference: Of the losses, weighted by tokens; None where a loss is not finite.
        ci_low: Lower end of the paired 95 % interval.
        ci_high: Upper end.
        num_rows: Rows compared.
        is_better: Whether the whole interval is below 0.
        kept: Whether the mask was written; False: an adapter that removes nothing was.
        sparsity: Fraction removed by the mask that was compared; None where ``mask_sparsity_auto`` did not choose it.
        budgets: The path of sizes that it was chosen from.
        objective: What was trained for, and measured.
    """

    difference: float | None
    ci_low: float | None
    ci_high: float | None
    num_rows: int
    is_better: bool
    kept: bool
    sparsity: float | None = None
    budgets: list[Budget] | None = None
    objective: str = "sft"

    def __str__(self) -> str:
        size = "" if self.sparsity is None else f" of {100 * self.sparsity:g} %"
        better = f"the mask{size} is {'' if self.is_better else 'not '}better than no mask"
        if self.difference is None:
            return f"{better}: its loss is not finite"
        interval = f"[{self.ci_low:+.4f}, {self.ci_high:+.4f}]"
        unit = OBJECTIVES[self.objective][1]
        return f"{better}: {self.difference:+.4f} {unit}, 95 % {interval}, on {self.num_rows:,} held-out rows"


def read_heldout(folder: str | Path) -> HeldoutLosses:
    """The held-out losses of the run in ``folder``."""
    file = Path(folder) / files.HELDOUT
    return read_model(HeldoutLosses, read_json(file), file)


@dataclass(frozen=True)
class RowMeter:
    """Measures the loss of rows, which the processes share; every process must call it with the same rows."""

    model: torch.nn.Module
    args: TrainingArguments
    pad_token_id: int
    context: Callable = nullcontext
    objective = "sft"

    def __call__(self, rows: Dataset) -> RowLosses:
        """Losses of the rows, in their order."""
        count, world, rank = len(rows), self.args.world_size, self.args.process_index
        # As many rows for each, or the others would wait for the one that has a batch more.
        own = [(rank + step * world) % count for step in range(math.ceil(count / world))]
        chosen = [{"input_ids": rows[n]["input_ids"], "labels": rows[n]["labels"]} for n in own]
        size = self.args.per_device_eval_batch_size
        with self.context():
            found = nll_per_item(self.model, chosen, batch_size=size, pad_token_id=self.pad_token_id)
        losses: RowLosses = [(0.0, 0)] * count
        for indices, parts in runtime.gather((own, found)):
            for index, pair in zip(indices, parts, strict=True):
                losses[index] = pair
        return losses


def judge(
    model,
    rows: Dataset,
    meter: RowMeter,
    method: MethodArguments,
    seed: int,
    clusters: list[str] | None = None,
) -> tuple[HeldoutLosses, Verdict | None]:
    """Measure the held-out rows, choose the size of the mask where that is asked for, and compare with the parent.

    Args:
        model: What was trained or made; the size of its mask is changed in place.
        rows: Tokenised held-out rows, at least one.
        meter: Measures them.
        method: The method; masks that are not learned are always kept.
        seed: Of the half of the rows that chooses the size.
        clusters: Labels of the rows that depend on each other; None: all are independent.

    Returns:
        The losses, and the verdict on a mask; None of other methods and of fewer than two rows, or clusters of them.
    """
    ids = row_ids(rows)
    units = clusters or ids  # what is drawn as one
    chosen_by: list[int] = []
    budgets = parent = None
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is not None:
        with model.disable_adapter():
            parent = meter(rows)
    if method.mask_sparsity_auto:
        chosen_by = choosing_half(units, seed)
        budgets = choose_sparsity(model, rows.select(chosen_by), meter, [parent[n] for n in chosen_by])
    losses = meter(rows)
    record = HeldoutLosses(
        ids=ids,
        num_tokens=[count for _, count in losses],
        nll=[nll for nll, _ in losses],
        parent_nll=None if parent is None else [nll for nll, _ in parent],
        chose_sparsity=[ids[n] for n in chosen_by],
        clusters=clusters,
        objective=meter.objective,
    )
    judging = sorted(set(range(len(ids))) - set(chosen_by))
    if not isinstance(config, MaskConfig) or len({units[n] for n in judging}) < MIN_ROWS:
        return record, None
    difference, low, high = paired_interval(record, judging)
    is_better = high is not None and high < 0
    return record, Verdict(
        difference=difference,
        ci_low=low,
        ci_high=high,
        num_rows=len(judging),
        is_better=is_better,
        kept=is_better or method.keep_worse or method.method != "mask",
        sparsity=config.sparsity if budgets else None,
        budgets=budgets,
        objective=meter.objective,
    )


def row_ids(rows: Dataset) -> list[str]:
    """Ids of the rows; their positions where they have none."""
    return list(map(str, rows["id"] if "id" in rows.column_names else range(len(rows))))


def paired_interval(losses: HeldoutLosses, rows: Sequence[int]) -> tuple[float | None, float | None, float | None]:
    """Mean difference to the parent over ``rows``, weighted by tokens, and its 95 % interval; None: not finite."""
    assert losses.parent_nll is not None
    nll, parent = (np.array([[each[n] for n in rows]]) for each in (losses.nll, losses.parent_nll))
    if not np.isfinite(nll - parent).all():
        return None, None, None
    unit = "fraction" if losses.objective == "grpo" else "nats"  # right and wrong have edges
    clusters = losses.clusters and [losses.clusters[n] for n in rows]
    sample = Sample("heldout", nll, parent, [losses.num_tokens[n] for n in rows], clusters)
    measured = Measured([sample], unit, num_resamples=10_000, seed=0)
    return measured.drawn.difference, *measured.interval(0.95)


def mean_nll(losses: RowLosses) -> float:
    """Nats per token over all rows."""
    return sum(nll * count for nll, count in losses) / sum(count for _, count in losses)


# The size of the mask


def check_rows(method: MethodArguments, data: Prepared) -> None:
    """Refuse, before training, too few held-out rows for a half that chooses the mask's size and one that judges."""
    clusters = clusters_of(data)
    count = len(data.heldout) if clusters is None else len(set(clusters))
    if method.mask_sparsity_auto and count < 2 * MIN_ROWS:
        raise UserError(
            f"mask_sparsity_auto has {count} held-out {'rows' if clusters is None else 'clusters of rows'}, one half "
            f"to choose with and one to judge; hold out at least {2 * MIN_ROWS} (eval_split_size)"
        )


def clusters_of(data: Prepared) -> list[str] | None:
    """``cluster_id`` of each held-out row that is measured; None where no row has one.

    Raises:
        UserError: If only some rows have one.
    """
    if "cluster_id" not in data.heldout_rows.column_names:
        return None
    found = {str(row.get("id")): row for row in data.heldout_rows}
    return cluster_ids([found.get(name, {}) for name in row_ids(data.heldout)])


def choosing_half(units: Sequence[str], seed: int) -> list[int]:
    """Positions of the half that chooses, by a seeded hash of ids or of clusters, which stay whole; the rest judges."""
    ranked = sorted(dict.fromkeys(units), key=lambda unit: digest(f"{seed}/{unit}"))
    chosen = set(ranked[: len(ranked) // 2])
    return [n for n, unit in enumerate(units) if unit in chosen]


def choose_sparsity(model, rows: Dataset, meter: RowMeter, parent: RowLosses) -> list[Budget]:
    """Give the mask the size of the lowest loss on ``rows``, all sizes from its trained scores; 0 removes nothing.

    Returns:
        What was measured, smallest first.
    """
    losses = {0.0: mean_nll(parent)}
    for sparsity in sorted({*BUDGETS[1:], model.peft_config[ADAPTER].sparsity}):
        set_sparsity(model, sparsity)
        losses[sparsity] = mean_nll(meter(rows))
    finite = {sparsity: loss for sparsity, loss in losses.items() if math.isfinite(loss)}
    set_sparsity(model, min(finite, key=lambda sparsity: (finite[sparsity], sparsity), default=0.0))
    return [Budget(sparsity=sparsity, nll=finite.get(sparsity)) for sparsity in losses]


@torch.no_grad()
def set_sparsity(model, sparsity: float) -> None:
    """Remove another share by the scores as they are."""
    config = model.peft_config[ADAPTER]
    config.sparsity, config.sparsity_ramp = sparsity, 0.0
    config.preset = None  # it may stand for another share
    for layer in adapter_layers(model, ADAPTER).values():
        layer.mask_scores[ADAPTER].mul_(1)  # masked weights are kept until their scores are written to


def remove_nothing(model) -> None:
    """Make the adapter one that changes nothing: it removes no weight, and modules trained beside it are reset."""
    config = model.peft_config[ADAPTER]
    own = {name for name in MaskConfig.__annotations__ if name not in (*_PLACES, *_IDENTITY)}
    for spec in fields(MaskConfig):
        if spec.name in own:
            setattr(config, spec.name, spec.default)
    set_sparsity(model, 0.0)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copies = zip(module.modules_to_save[ADAPTER].parameters(), module.original_module.parameters(), strict=True)
            for copy, original in copies:
                copy.data.copy_(original.data)


def never_worse(
    model,
    tokenizer,
    data: Prepared,
    config: TrainConfig,
    training: TrainingArguments,
    trainer: MaskTrainer | None = None,
) -> tuple[HeldoutLosses | None, Verdict | None]:
    """Compare what was trained with its parent on the held-out rows; a mask that is not better removes nothing.

    Returns:
        The losses and, of a mask, the verdict; None where held-out rows are not measured.
    """
    if training.eval_strategy == "no":
        return None, None
    meter = RowMeter(model, training, tokenizer.pad_token_id or 0)
    if trainer is not None and trainer.meter is not None:
        meter = trainer.meter
    elif trainer is not None:
        whole = trainer.accelerator.unwrap_model(trainer.model)
        meter = replace(meter, model=whole, context=trainer.compute_loss_context_manager)
    losses, verdict = judge(model, data.heldout, meter, config.method, config.data.split_seed, clusters_of(data))
    if verdict is not None and not verdict.kept:
        remove_nothing(model)
    return losses, verdict
