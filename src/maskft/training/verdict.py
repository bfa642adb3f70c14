"""Never worse: a trained mask is compared with its unmasked parent on held-out rows, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft.utils import ModulesToSaveWrapper
from pydantic import ConfigDict

from maskft_common import layout
from maskft_common.files import read_json
from maskft_common.schema import FileModel, read_model

from ..data.prepared import Prepared
from ..loss import RowLoss
from ..tuner import MaskConfig
from .arguments import TrainConfig
from .method_arguments import ADAPTER
from .peft_config import keeps_base

# For a paired interval.
MIN_ROWS = 2
NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
# Row indices in memory at a time.
_MAX_DRAWS = 2**22

Measure = Callable[[Sequence[Mapping[str, Any]]], list[RowLoss]]


class HeldoutLosses(FileModel):
    """Content of ``heldout.json``: losses row by row, so that runs on the same rows can be compared in pairs.

    Attributes:
        ids: Ids of the rows, in the order of the lists below.
        num_tokens: Supervised tokens of each row.
        nll: Loss of each row under the best checkpoint, in nats per token; of a mask even if it was not kept.
        parent_nll: Loss without the adapter; None for full fine-tuning and adapters that change their parent.
        clusters: ``cluster_id`` of each row: rows of one cluster (questions on one passage) depend on each other; None
            if rows have none.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    ids: list[str]
    num_tokens: list[int]
    nll: list[float]
    parent_nll: list[float] | None = None
    clusters: list[str] | None = None


class Verdict(FileModel):
    """The mask minus its parent on held-out rows, in nats per token: below 0 the mask is better.

    Attributes:
        difference: Difference of the losses, weighted by tokens; None if a loss is not finite.
        ci_low: Lower end of the paired 95 % interval.
        ci_high: Upper end.
        num_rows: Rows compared.
        is_better: Whether the whole interval is below 0.
        kept: Whether the mask was written; else the adapter removes nothing.
    """

    difference: float | None
    ci_low: float | None
    ci_high: float | None
    num_rows: int
    is_better: bool
    kept: bool

    def __str__(self) -> str:
        if self.difference is None or self.ci_low is None:
            return "the mask is not shown to be better than no mask: a held-out loss is not finite"
        if self.is_better:
            comparison = "better than"
        elif self.ci_low > 0:
            comparison = "worse than"
        else:
            comparison = "not distinguishable from"

        digits = decimals(self.difference, self.ci_low, self.ci_high)
        low = f"{self.ci_low:+.{digits}f}"
        high = f"{self.ci_high:+.{digits}f}"
        difference = f"{self.difference:+.{digits}f} nats/token"
        on_rows = f"on {self.num_rows:,} held-out rows"
        return f"the mask is {comparison} no mask: {difference}, 95 % [{low}, {high}], {on_rows}"


def decimals(*numbers: float | None) -> int:
    """Four decimals, or more if a number would round to zero: "[-0.0001, -0.0000] better" contradicts itself."""
    digits = 4
    # Zero itself has no digits to show, and None is not shown.
    sizes = [abs(number) for number in numbers if number]
    smallest = min(sizes, default=1.0)
    # Half a unit of the last decimal rounds to zero.
    while smallest < 0.5 * 10**-digits and digits < 8:
        digits += 1
    return digits


def read_heldout(folder: str | Path) -> HeldoutLosses:
    """The held-out losses of the run in ``folder``."""
    file = Path(folder) / layout.HELDOUT
    return read_model(HeldoutLosses, read_json(file), file)


def never_worse(
    model,
    data: Prepared,
    config: TrainConfig,
    measure: Measure,
    parent: list[RowLoss] | None = None,
) -> tuple[HeldoutLosses | None, Verdict | None]:
    """Compare a model with its parent on the held-out rows; a learned mask that is not better is set to remove nothing.

    Args:
        model: The model; its mask is changed in place.
        data: The rows.
        config: The run.
        measure: Measures held-out rows under ``model``.
        parent: Their losses without the adapter, if they are known.

    Returns:
        The losses, None if held-out rows are not measured. The verdict, None for other methods than masks, and for
        fewer than two rows or clusters of rows.
    """
    if config.training.eval_strategy == "no":
        return None, None

    # None for full fine-tuning.
    adapter = getattr(model, "peft_config", {}).get(ADAPTER)
    # Else the parent is gone.
    if parent is None and keeps_base(model):
        with model.disable_adapter():
            parent = measure(data.heldout)
    found = measure(data.heldout)
    losses = _losses_of(data.heldout, found, parent)

    # Rows of one cluster are one observation.
    num_units = len(set(losses.clusters or losses.ids))
    if not isinstance(adapter, MaskConfig) or num_units < MIN_ROWS:
        return losses, None

    difference, low, high = paired_interval(losses)
    # Without an interval, because a loss is not finite, nothing is shown.
    is_better = high is not None and high < 0
    # Fixed masks are controls, and always kept.
    is_control = config.method.method != "mask"
    kept = is_better or config.method.keep_worse or is_control
    if not kept:
        remove_nothing(model)
    verdict = Verdict(
        difference=difference,
        ci_low=low,
        ci_high=high,
        num_rows=len(losses.ids),
        is_better=is_better,
        kept=kept,
    )
    return losses, verdict


def _losses_of(
    rows: Dataset,
    found: list[RowLoss],
    parent: list[RowLoss] | None,
) -> HeldoutLosses:
    """The content of ``heldout.json``, from the losses of the rows under a model and under its parent."""
    clusters = None
    if "cluster_id" in rows.column_names:
        # A list, where datasets would return a lazy column.
        clusters = rows["cluster_id"][:]
    parent_nll = None
    if parent is not None:
        parent_nll = [nll for nll, _ in parent]
    return HeldoutLosses(
        ids=row_ids(rows),
        num_tokens=[count for _, count in found],
        nll=[nll for nll, _ in found],
        parent_nll=parent_nll,
        clusters=clusters,
    )


def row_ids(rows: Dataset) -> list[str]:
    """Ids of the rows; their positions if they have none."""
    if "id" in rows.column_names:
        ids = rows["id"]
    else:
        ids = range(len(rows))
    return [str(row_id) for row_id in ids]


# The interval


def paired_interval(losses: HeldoutLosses) -> tuple[float | None, float | None, float | None]:
    """Mean difference to the parent, weighted by tokens, and its 95 % interval; all None if a loss is not finite.

    A percentile bootstrap of rows, or of clusters of rows; deviations are stretched to the width of a t interval.
    """
    assert losses.parent_nll is not None
    # Differences summed over the tokens of a row; below, over those of a cluster.
    tokens = np.array(losses.num_tokens, dtype=float)
    differences = np.array(losses.nll) - np.array(losses.parent_nll)
    sums = tokens * differences
    if not np.isfinite(sums).all():
        return None, None, None
    if losses.clusters is not None:
        # Rows of one cluster depend on each other, so a cluster is drawn as a whole. bincount with weights is the sum
        # of the rows of each cluster.
        _, units = np.unique(losses.clusters, return_inverse=True)
        sums = np.bincount(units, sums)
        tokens = np.bincount(units, tokens)

    difference = sums.sum() / tokens.sum()
    deviations = _resampled(sums, tokens) - difference

    # The variance of a resampled mean is (n - 1) / n of the unbiased estimate, and percentiles take the estimate for
    # the true variance: hence the two factors.
    count = len(sums)
    tail = (1 + CONFIDENCE) / 2
    normal_quantile = NormalDist().inv_cdf(tail)
    t_to_normal = _t_quantile(count - 1) / normal_quantile
    stretch = math.sqrt(count / (count - 1)) * t_to_normal

    stretched = difference + stretch * deviations
    low, high = np.quantile(stretched, [1 - tail, tail])
    return float(difference), float(low), float(high)


def _resampled(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean per token of each resample of the units, which are rows or clusters; shape (NUM_RESAMPLES,)."""
    # A fixed seed: the verdict on the same losses is always the same.
    random = np.random.default_rng(0)
    count = len(sums)
    means = np.empty(NUM_RESAMPLES)
    # Resamples drawn at once, so that the indices of all of them are never in memory together.
    chunk = max(1, _MAX_DRAWS // count)
    for start in range(0, NUM_RESAMPLES, chunk):
        stop = min(start + chunk, NUM_RESAMPLES)
        drawn = random.integers(count, size=(stop - start, count))
        total_nll = sums[drawn].sum(1)
        total_tokens = tokens[drawn].sum(1)
        means[start:stop] = total_nll / total_tokens
    return means


def _t_quantile(degrees: int) -> float:
    """Two-sided quantile of Student's t at ``CONFIDENCE``, to six digits; scipy is not a dependency of training.

    With t = sqrt(degrees) * tan(angle), the density of the angle is proportional to cos(angle) ** (degrees - 1). It is
    integrated numerically and inverted.
    """
    # The angle's standard deviation is about 1 / sqrt(degrees); the mass beyond 12 of these is below six digits.
    largest_angle = min(math.pi / 2, 12 / math.sqrt(degrees))
    angles = np.linspace(0, largest_angle, 2**18 + 1)

    # The midpoint rule; the width of the intervals cancels.
    middles = (angles[1:] + angles[:-1]) / 2
    densities = np.cos(middles) ** (degrees - 1)
    cumulative = np.cumsum(densities)
    mass = np.concatenate([[0.0], cumulative])

    # From the middle outwards: the share of the whole mass that lies within the angle, on both sides.
    wanted = CONFIDENCE * mass[-1]
    angle = np.interp(wanted, mass, angles)
    return math.sqrt(degrees) * math.tan(angle)


def remove_nothing(model) -> None:
    """Make the adapter remove no weight, and reset modules that were trained beside it."""
    # A top-k mask of sparsity 0 keeps every weight, whatever the scores are. So the selection goes back to its default,
    # top-k, with all other settings of removal.
    config = model.peft_config[ADAPTER]
    for spec in fields(MaskConfig):
        if spec.metadata.get("is_of_removal"):
            setattr(config, spec.name, spec.default)
    config.sparsity = 0.0
    config.sparsity_ramp = 0.0

    # PEFT keeps the modules of modules_to_save twice: as they were loaded, and as they are trained.
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        trained = module.modules_to_save[ADAPTER].parameters()
        originals = module.original_module.parameters()
        for copy, original in zip(trained, originals, strict=True):
            copy.data.copy_(original.data)
