"""The runs of a study, and the settings that were tried for a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from maskft.training.method_arguments import INTERPOLATE, SHARES

from .recipe import PRETRAINED, Method, Options

# Roles of a run's models: the best checkpoint on held-out rows, and the end of training.
BEST = "best"
LAST = "last"

# Options that are lists of layers.
LAYERS = ("mask_layers_to_transform", "partial_layers")

# A point between the base model and the end of training: share of the steps, fraction of the weights' change.
Point = tuple[float, float]
# Set of rows -> metric -> value.
PointValues = Mapping[str, Mapping[str, float]]


def settings_text(settings: Options) -> str:
    """Settings as text, e.g. ``learning_rate=0.003, num_train_epochs=40``."""
    words = [f"{option}={value}" for option, value in settings.items()]
    return ", ".join(words)


# eq=False: runs are compared and hashed by identity. Their fields have dictionaries, which have no hash.
@dataclass(frozen=True, eq=False)
class StudyRun:
    """One run: one training (or one base model as it is), and the evaluations of its models.

    Attributes:
        method: The recipe's method.
        model: Base model of the study.
        seed: Seed of training; also that of the mask unless ``mask_seed`` is given.
        axes: Grid values of this run and of the runs it is made from: (method, option) -> value.
        options: Options of ``maskft train``, without paths and model.
        start: The run whose best checkpoint it starts from; None: the base model.
        match: The run whose mask gives a fixed mask its counts.
        masks: ``start_mask`` or ``keep_mask`` -> the run whose mask that is.
        id: Folder name; ends with the hash.
        stage: One more than the stage of the runs whose losses choose its settings.
        is_assumed: Settings, its own or of its parents, are not chosen yet; ``options`` holds a guess.
        tried: Settings that tuning tries with this run, which is then not evaluated.
        tuned: How its settings were chosen.
        point: The point of its path that is kept; None: the best checkpoint by held-out loss.
        data: Digest of its data files, and of others that its options name, when the plan was made.
    """

    method: Method
    model: str
    seed: int
    axes: dict[tuple[str, str], Any]
    options: dict[str, Any]
    start: StudyRun | None
    match: StudyRun | None
    masks: dict[str, StudyRun]
    id: str
    stage: int = 1
    is_assumed: bool = False
    # Of a run whose method is tuned, one of the two is set: `tried` for trials, `tuned` for the others.
    tried: dict[str, Any] | None = None
    tuned: Tuned | None = None
    point: Point | None = None
    data: str | None = None

    @property
    def hash(self) -> str:
        """The part of the id that depends on the settings."""
        return self.id.rpartition("-")[2]

    @property
    def parents(self) -> list[StudyRun]:
        """The runs that must be trained before this one starts."""
        candidates = [self.start, self.match]
        candidates += self.masks.values()
        return [run for run in candidates if run is not None]

    @property
    def is_continued(self) -> bool:
        """Whether it starts from a model that the study has trained."""
        return self.start is not None and self.start.method.method != PRETRAINED

    @property
    def takes_values_before(self) -> bool:
        """Whether removed weights take their values from the model before ``start`` was trained."""
        if self.start is None or "mask_removed_value_model" in self.options:
            return False
        return self.options.get("mask_removed_value") == "base"

    @property
    def variant(self) -> str:
        """Grid values as a suffix of a label, e.g. `` [sparsity=0.05]``; empty without a grid.

        An option that two methods of the grid have is written with the name of the other method.
        """
        if not self.axes:
            return ""

        # Of all methods on the axes, this one and those it is made from.
        options = [option for _, option in self.axes]
        words = []
        for (name, option), value in self.axes.items():
            is_shared = options.count(option) > 1
            is_of_other = name != self.method.name
            prefix = f"{name} " if is_shared and is_of_other else ""
            shown_option = option.removeprefix("mask_")
            shown_value = _value_text(option, value)
            words.append(f"{prefix}{shown_option}={shown_value}")
        all_words = ", ".join(words)
        return f" [{all_words}]"

    @property
    def roles(self) -> tuple[str, ...]:
        """Which of the run's models are kept."""
        if self.method.last:
            return (BEST, LAST)
        return (BEST,)

    @property
    def num_tried(self) -> int:
        """Number of settings, or drawn masks, among which held-out rows chose this one; 0 without a choice."""
        # Tables show this number: the best of many is better by chance alone.
        elsewhere = self.method.tuned_elsewhere or 0
        if self.tuned:
            return self.tuned.num_settings + elsewhere
        if self.method.method == INTERPOLATE:
            return len(SHARES)  # of the two models that are mixed

        # A random mask may be the best of several.
        num_drawn = 1
        if self.method.method == "random_mask":
            num_drawn = self.options.get("num_candidates", 1)
        return num_drawn if num_drawn > 1 else elsewhere

    @property
    def labels(self) -> dict[str, str]:
        """Role (``best``, ``last``) -> name in tables; empty for a run of tuning."""
        if self.tried is not None:  # it is measured on the rows that choose alone
            return {}
        labels = {}
        # Both have one entry, or with `last` two: best, last.
        for role, label in zip(self.roles, self.method.labels, strict=True):
            labels[role] = label + self.variant
        return labels

    @property
    def name(self) -> str:
        """Method and grid values."""
        return self.method.name + self.variant

    @property
    def title(self) -> str:
        """Name of the run in messages: method, grid values, settings that are tried, seed."""
        tried = ""
        if self.tried:
            tried = f", {settings_text(self.tried)}"
        return f"{self.name}{tried}, seed {self.seed}"


@dataclass(frozen=True)
class Heldout:
    """Held-out loss of one finished run.

    Attributes:
        loss: Loss of the best checkpoint, in nats per token; infinite if the run diverged.
        points: Measurements along the run's path; empty without a path.
        over_budget: Nats per token by which the KL of that checkpoint exceeds ``kl_budget``; 0 within the budget, and
            without one.
        points_over_budget: The same of the checkpoints that the points are of; infinite if its KL was not measured.
            Empty without a budget.
    """

    loss: float
    points: Mapping[Point, PointValues] = field(default_factory=dict)
    over_budget: float = 0.0
    points_over_budget: Mapping[Point, float] = field(default_factory=dict)


# Held-out loss of a run; None while it is not finished. A function, so that a plan can be made without any files.
Look = Callable[[StudyRun], Heldout | None]


@dataclass(frozen=True)
class Trial:
    """Settings that are tried, with the run of the first seed that tries them."""

    settings: Options
    run: StudyRun
    heldout: Heldout | None  # None while the run is not finished


@dataclass(frozen=True)
class PathPoint:
    """A point of a path, compared with the base model on the same rows.

    Attributes:
        trial: The settings whose path it is on.
        point: Its place on the path.
        gain: Accuracy, or for rows without answers the base's loss minus its loss, in nats per token.
        forgetting: Mean rise of the loss on the sets of earlier abilities over the base's, in nats per token.
        values: All measurements.
        over_budget: Nats per token by which the KL of its checkpoint exceeds ``kl_budget``; 0 without a budget. A part
            of a change counts as the whole does: its own KL is not measured.
    """

    trial: Trial
    point: Point
    gain: float
    forgetting: float
    values: PointValues
    over_budget: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record."""
        share, scale = self.point
        return {
            "settings": self.trial.settings,
            "checkpoint": share,
            "scale": scale,
            "gain": self.gain,
            "forgetting": self.forgetting,
            "values": self.values,
        }


@dataclass(frozen=True)
class Tuned:
    """The settings that were tried for a method, and the winner.

    Attributes:
        trials: The settings, each with its run.
        winner: The best trial; a guess while not settled.
        is_settled: Whether all trials are finished.
        point: The point of the winner's path that ``path.choose`` takes.
        points: All points of all trials.
        base: Measurements of the model before training on the same rows.
    """

    trials: list[Trial]
    winner: Trial
    is_settled: bool
    point: Point | None = None
    points: list[PathPoint] = field(default_factory=list)
    base: PointValues | None = None

    @property
    def stage(self) -> int:
        """The last stage of its trials."""
        return max(trial.run.stage for trial in self.trials)

    @property
    def num_settings(self) -> int:
        """How many settings were tried; with points along paths, how many points were candidates."""
        # With a path, every trial that did not diverge has all points of the path.
        return max(len(self.trials), len(self.points))  # points are empty without a path

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record for the study's summary."""
        record: dict[str, Any] = {
            "method": self.winner.run.name,
            "seeds": [self.winner.run.seed],
            "num_settings": self.num_settings,
            "trials": [_trial_record(trial) for trial in self.trials],
            "winner": self.winner.settings,
        }
        # Of a path; summaries of studies without one have no such keys.
        if self.point is not None:
            share, scale = self.point
            record["point"] = {"checkpoint": share, "scale": scale}
        if self.points:
            record["points"] = [point.to_dict() for point in self.points]
        return record

    def __str__(self) -> str:
        """E.g. ``full: learning_rate=0.003 is the best of 4 settings on held-out rows``."""
        name = self.winner.run.name
        settings = settings_text(self.winner.settings) or "its setting"

        # With a path, the winner is a point, chosen by gain and forgetting and not by the loss.
        if self.point is not None:
            share, scale = self.point
            settings += f" at {share:g} of training, {scale:g} of the change,"
        else:
            # Equal losses, as at learning rate 0: calling the first one the best would mislead.
            losses = [trial.heldout.loss for trial in self.trials if trial.heldout is not None]
            has_several = len(losses) > 1
            are_equal = len(set(losses)) == 1
            if has_several and are_equal and math.isfinite(losses[0]):
                return f"{name}: {settings} is the first of {len(losses)} with the same held-out loss"

        text = f"{name}: {settings} is the best of {self.num_settings} on held-out rows"
        parts = [text, *self._edges()]
        return "; ".join(parts)

    def _edges(self) -> Iterator[str]:
        """The winner's values at an end of their list: a better value may lie beyond it."""
        for option, value in self.winner.settings.items():
            # A list of one value has no ends, and texts have no order.
            tried = [trial.settings[option] for trial in self.trials]
            numbers = {each for each in tried if _is_number(each)}
            # A set, because a value occurs once for each combination with the other options.
            if len(numbers) < 2:
                continue
            if value == min(numbers):
                yield f"no lower {option} was tried"
            elif value == max(numbers):
                yield f"no higher {option} was tried"


def _trial_record(trial: Trial) -> dict[str, Any]:
    """JSON-able record of settings that were tried."""
    loss = None
    # JSON has no infinity, which is the loss of a run that diverged.
    if trial.heldout is not None and not math.isinf(trial.heldout.loss):
        loss = trial.heldout.loss
    return {
        "settings": trial.settings,
        "runs": [trial.run.id],
        "heldout_loss": loss,
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # a bool is an int, and has no neighbours


def _value_text(option: str, value: Any) -> str:
    """A grid value in a label; consecutive layers as first-last."""
    if value is None:
        # Layers and rows that are not restricted are all of them.
        is_restriction = option in (*LAYERS, "max_train_samples")
        return "all" if is_restriction else "default"

    # A list of one layer is shown as a list.
    if not isinstance(value, list) or len(value) < 2:
        return str(value)

    # Layers or other numbers; a list of names, such as target_modules, is shown as it is.
    has_only_numbers = all(isinstance(number, int) for number in value)
    if not has_only_numbers:
        return str(value)

    first = value[0]
    consecutive = list(range(first, first + len(value)))
    if value == consecutive:
        return f"{first}-{value[-1]}"
    return str(value)
