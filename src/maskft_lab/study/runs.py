"""The runs of a study, and what was tried to choose their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from maskft.training.method_arguments import INTERPOLATE, SHARES

from .recipe import Method, Options

BEST, LAST = "best", "last"
LAYERS = ("mask_layers_to_transform", "partial_layers")
Point = tuple[float, float]  # share of training, and part of the change, of a model between the base and the end
PointValues = Mapping[str, Mapping[str, float]]  # set of rows -> metric -> value


def settings_text(settings: Options) -> str:
    """Settings for people, e.g. ``learning_rate=0.003, num_train_epochs=40``."""
    return ", ".join(f"{option}={value}" for option, value in settings.items())


@dataclass(frozen=True, eq=False)
class StudyRun:
    """One run: one training (or one base model taken as it is), and the evaluations of its models."""

    method: Method
    model: str  # base model of the study
    seed: int  # of training; also that of the mask unless `mask_seed` is given
    axes: dict[tuple[str, str], Any]  # the grid's values that this run or one it is made from has
    options: dict[str, Any]  # of `maskft train`, without paths and model
    start: StudyRun | None  # the run whose best checkpoint it starts from; None: the base model
    match: StudyRun | None  # the run whose mask gives a fixed mask its counts
    masks: dict[str, StudyRun]  # `start_mask` or `keep_mask` -> the run whose mask that is
    id: str  # folder name; ends with the hash
    stage: int = 1  # one more than that of the runs whose losses choose its settings
    is_assumed: bool = False  # settings, its own or of its parents, are still to be chosen; those here are a guess
    tried: dict[str, Any] | None = None  # settings that tuning tries with this run, which is not evaluated
    tuned: Tuned | None = None  # how its settings were chosen
    point: Point | None = None  # of its path, the one that is kept; None: the best checkpoint by held-out loss

    @property
    def hash(self) -> str:
        """The part of the id that settings decide."""
        return self.id.rpartition("-")[2]

    @property
    def parents(self) -> list[StudyRun]:
        """The runs that must be finished before this one starts."""
        return [run for run in (self.start, self.match, *self.masks.values()) if run is not None]

    @property
    def takes_values_before(self) -> bool:
        """Whether a removed weight takes the value it had in the model that the mask's parent was made from."""
        is_base = self.options.get("mask_removed_value") == "base" and self.start is not None
        return is_base and "mask_removed_value_model" not in self.options

    @property
    def variant(self) -> str:
        """The grid's values as they stand in a label, e.g. `` [sparsity=0.05]``; empty without a grid.

        An option that another method in the grid has too stands with the name of that one.
        """
        options = [option for _, option in self.axes]
        words = []
        for (name, option), value in self.axes.items():
            whose = f"{name} " if options.count(option) > 1 and name != self.method.name else ""
            # Nothing said means all layers, all rows; of other options the default.
            is_all = option in (*LAYERS, "max_train_samples")
            text = _short(value) if value is not None else "all" if is_all else "default"
            words.append(f"{whose}{option.removeprefix('mask_')}={text}")
        return f" [{', '.join(words)}]" if words else ""

    @property
    def roles(self) -> tuple[str, ...]:
        """Which of the run's models are kept."""
        return (BEST, LAST) if self.method.last else (BEST,)

    @property
    def num_tried(self) -> int:
        """Settings, or drawn masks, of which this is the best on held-out rows; 0: nothing was chosen."""
        elsewhere = self.method.tuned_elsewhere or 0
        if self.tuned:
            return self.tuned.num_settings + elsewhere
        if self.method.method == INTERPOLATE:
            return len(SHARES)
        chosen = self.options.get("num_candidates", 1) if self.method.method == "random_mask" else 1
        return chosen if chosen > 1 else elsewhere

    @property
    def labels(self) -> dict[str, str]:
        """Role (``best``, ``last``) -> name in tables; empty for a run of tuning."""
        if self.tried is not None:
            return {}
        return dict(zip((BEST, LAST), (label + self.variant for label in self.method.labels), strict=False))

    @property
    def name(self) -> str:
        """Method and grid values."""
        return self.method.name + self.variant

    @property
    def title(self) -> str:
        """Name of the run for people: method, grid values, seed."""
        tried = f", {settings_text(self.tried)}" if self.tried else ""
        return f"{self.name}{tried}, seed {self.seed}"


@dataclass(frozen=True)
class Heldout:
    """Held-out loss of one finished run.

    Attributes:
        loss: Of the best checkpoint, in nats per token; infinite where the run diverged.
        points: What was measured along the run's path; empty without one.
    """

    loss: float
    points: Mapping[Point, PointValues] = field(default_factory=dict)


Look = Callable[[StudyRun], Heldout | None]


@dataclass(frozen=True)
class Trial:
    """Settings that are tried, with the run of the first seed that tries them."""

    settings: Options
    run: StudyRun
    heldout: Heldout | None  # None: the run is not finished


@dataclass(frozen=True)
class ChosenFrom:
    """A point of a path, beside the base model on the same rows.

    Attributes:
        trial: The settings it is of.
        point: Which.
        gain: Accuracy, or where rows have no answers what the base's loss is higher, in nats per token.
        forgetting: Mean over the losses of earlier abilities of what it is higher than the base's, in nats per token.
        values: All that was measured.
    """

    trial: Trial
    point: Point
    gain: float
    forgetting: float
    values: PointValues

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record."""
        share, scale = self.point
        place = {"settings": self.trial.settings, "checkpoint": share, "scale": scale}
        return place | {"gain": self.gain, "forgetting": self.forgetting, "values": self.values}


@dataclass(frozen=True)
class Tuned:
    """What was tried for a method, and what won."""

    trials: list[Trial]
    winner: Trial  # while not settled: a guess
    is_settled: bool
    point: Point | None = None  # that of the winner's path which `path.choose` takes
    points: list[ChosenFrom] = field(default_factory=list)
    base: PointValues | None = None  # what the rows of the points say of the model before training

    @property
    def stage(self) -> int:
        """The last one of its trials."""
        return max(trial.run.stage for trial in self.trials)

    @property
    def num_settings(self) -> int:
        """How many settings were tried."""
        return max(len(self.trials), len(self.points))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record for the study's summary."""
        trials = [
            {
                "settings": trial.settings,
                "runs": [trial.run.id],
                "heldout_loss": None if trial.heldout is None or math.isinf(trial.heldout.loss) else trial.heldout.loss,
            }
            for trial in self.trials
        ]
        return {
            "method": self.winner.run.name,
            "seeds": [self.winner.run.seed],
            "num_settings": self.num_settings,
            "trials": trials,
            "winner": self.winner.settings,
            **({} if self.point is None else {"point": dict(zip(("checkpoint", "scale"), self.point, strict=True))}),
            **({"points": [point.to_dict() for point in self.points]} if self.points else {}),
        }

    def __str__(self) -> str:
        """E.g. ``full: learning_rate=0.003 is the best of 4 settings on held-out rows``."""
        settings = settings_text(self.winner.settings) or "its setting"
        if self.point is not None:
            settings += f" at {self.point[0]:g} of training, {self.point[1]:g} of the change,"
        known = [trial.heldout.loss for trial in self.trials if trial.heldout is not None]
        if self.point is None and len(known) > 1 and len(set(known)) == 1 and math.isfinite(known[0]):
            return f"{self.winner.run.name}: {settings} is the first of {len(known)} with the same held-out loss"
        text = f"{self.winner.run.name}: {settings} is the best of {self.num_settings} on held-out rows"
        return "; ".join([text, *self._edges()])

    def _edges(self) -> Iterator[str]:
        """Which values of the winner have no neighbour on one side: a better one may lie there."""
        for option, value in self.winner.settings.items():
            tried = sorted({one for each in self.trials if type(one := each.settings[option]) in (int, float)})
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                yield f"no {'lower' if value == tried[0] else 'higher'} {option} was tried"


def _short(value: Any) -> str:
    """A list of consecutive layers as first-last."""
    is_list = isinstance(value, list) and len(value) > 1 and all(isinstance(number, int) for number in value)
    if is_list and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return str(value)
