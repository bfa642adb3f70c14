"""Tuning a method of a study: which settings are tried, and which of them the held-out rows choose.

The rows are those held out from the training data, never those that a study reports on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskft.data.mixtures import rename_sets
from maskft.training.method_arguments import INTERPOLATE
from maskft_base.errors import UserError
from maskft_base.files import digest_file

from ..evaluation.arguments import HELDOUT
from .recipe import Choice, Method, Options, Recipe, TimesParent

if TYPE_CHECKING:
    from .plan import StudyRun

Point = tuple[float, float]  # share of training, and part of the change, of a model between the base and the end
PointValues = Mapping[str, Mapping[str, float]]  # set of rows -> metric -> value


@dataclass(frozen=True)
class Heldout:
    """Held-out loss of one finished run.

    Attributes:
        loss: Of the best checkpoint, in nats per token; infinite where the run failed.
        points: What was measured along the run's path; empty without one.
    """

    loss: float
    points: Mapping[Point, PointValues] = field(default_factory=dict)


Look = Callable[["StudyRun"], Heldout | None]


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


def points_of(trials: Sequence[Trial], base: PointValues) -> list[ChosenFrom]:
    """All points of the finished trials of a method; ``base``: the same sets of rows of the model before training."""
    out = []
    for trial in trials:
        for point, values in trial.heldout.points.items() if trial.heldout else ():
            own, lost = values[HELDOUT], [name for name in values if name != HELDOUT and "nll" in values[name]]
            gain = own["accuracy"] if "accuracy" in own else base[HELDOUT]["nll"] - own["nll"]
            rises = [values[name]["nll"] - base[name]["nll"] for name in lost]
            out.append(ChosenFrom(trial, point, gain, sum(rises) / len(rises) if rises else 0.0, values))
    return out


def choose(points: Sequence[ChosenFrom], best_gain: float, rule: Choice) -> ChosenFrom:
    """The point with the least forgetting that gains enough, or with the most gain that forgets little enough.

    Where no point does, the one that comes nearest.

    Args:
        points: Those of one method.
        best_gain: The best of any method of the same data.
        rule: The constraint.
    """
    if rule.accuracy_at_least is not None:
        enough = [each for each in points if each.gain >= rule.accuracy_at_least * best_gain]
        return min(enough, key=lambda p: (p.forgetting, -p.gain)) if enough else max(points, key=lambda p: p.gain)
    little = [each for each in points if each.forgetting <= rule.forgetting_at_most]
    return max(little, key=lambda p: (p.gain, -p.forgetting)) if little else min(points, key=lambda p: p.forgetting)


@dataclass(frozen=True)
class Tuned:
    """What was tried for a method, and what won."""

    method: Method
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
        """JSON-able record for the study's summary; lists of seeds and runs, as several seeds chose once."""
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
            "num_runs": len(trials),
            "trials": trials,
            "winner": self.winner.settings if self.is_settled else None,
            **({} if self.point is None else {"point": dict(zip(("checkpoint", "scale"), self.point, strict=True))}),
            **({"points": [point.to_dict() for point in self.points]} if self.points else {}),
        }

    def __str__(self) -> str:
        """E.g. ``full: learning_rate=0.003 is the best of 4 settings on held-out rows``."""
        settings = settings_text(self.winner.settings) or "its setting"
        if self.point is not None:
            settings += f" at {self.point[0]:g} of training, {self.point[1]:g} of the change,"
        return f"{self.winner.run.name}: {settings} is the best of {self.num_settings} on held-out rows"


def settings_text(settings: Options) -> str:
    """Settings for people, e.g. ``learning_rate=0.003, num_train_epochs=40``."""
    return ", ".join(f"{option}={value}" for option, value in settings.items())


def tune(method: Method, own: Options, parent: Options, run_of: Callable[[Options], StudyRun], look: Look) -> Tuned:
    """Try every combination of the values; the lowest held-out loss wins.

    Args:
        method: The method, which has a ``tune``.
        own: Its options of ``maskft train``, defaults included.
        parent: Those of the run that it starts from.
        run_of: Makes the run that tries settings.
        look: Held-out loss of a run; None where it is not finished.
    """
    if own.get("eval_strategy") == "no":
        raise UserError(f"method {method.name!r}: tune chooses by held-out loss, and eval_strategy is no; drop that")
    if "num_train_epochs" in method.tune.grid and (_number(own.get("max_steps")) or 0) > 0:
        raise UserError(f"method {method.name!r}: max_steps decides the length, and tune is of num_train_epochs")
    tried = [(settings, run_of(settings)) for settings in _grid(method, parent)]
    trials = [Trial(settings, run, look(run)) for settings, run in tried]
    losses = [trial.heldout.loss for trial in trials if trial.heldout]
    is_settled = len(losses) == len(trials)
    return Tuned(method, trials, trials[losses.index(min(losses)) if is_settled else 0], is_settled)


def _grid(method: Method, parent: Options) -> list[Options]:
    """Every combination of the values to try."""
    lists = {}
    for option, values in method.tune.grid.items():
        if isinstance(values, TimesParent):
            base = _number(parent.get(option))
            if not base:
                raise UserError(
                    f"method {method.name!r}: tune.{option} is given as times_parent, and {method.start!r} has none; "
                    "give the values"
                )
            values = [float(f"{factor * base:.6g}") for factor in values.times_parent]
        lists[option] = values
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def how_chosen(method: Method, options: Options) -> str | None:
    """``tuned`` or ``chosen`` where held-out rows choose more of a method than its checkpoint, None where they do not.

    Args:
        method: The method.
        options: Its options of ``maskft train``, those of all methods included.
    """
    if method.tune is not None:
        return "tuned"
    is_best_drawn = method.method == "random_mask" and (_number(options.get("num_candidates")) or 1) > 1
    return "chosen" if is_best_drawn or method.method == INTERPOLATE else None


def check_test_rows(recipe: Recipe) -> None:
    """Refuse to tune or choose on rows that the study reports on."""
    reported = {}
    for evaluated in (recipe.evaluation, *recipe.before.values()):
        reported |= data_sets(*_heldout_source(evaluated))
    for method in recipe.methods.values():
        data = recipe.train | recipe.data[method.data or next(iter(recipe.data))].options | method.options
        verb = how_chosen(method, data)
        if verb is None:
            continue
        name, split = _heldout_source(data)
        chosen = data_sets(name, split)
        same = next((chosen[key] for key in chosen if key in reported), None)
        if same is not None:
            raise UserError(
                f"method {method.name!r} would be {verb} on rows of {same!r}, which evaluation reports on; hold out "
                "rows of the training data (eval_split_size)"
            )
        if split == "test":
            raise UserError(
                f"method {method.name!r} would be {verb} on the split 'test' of {name!r}; "
                "hold out rows of the training data (eval_split_size)"
            )


def _heldout_source(options: Mapping[str, Any]) -> tuple[str | None, str]:
    """Data set and split that held-out rows are from, in options of ``maskft train`` or ``evaluate``."""
    name = options.get("eval_dataset_name")
    split = options.get("dataset_eval_split") or ("test" if name and not Path(name).is_file() else None)
    return name or options.get("dataset_name"), split or options.get("dataset_train_split") or "train"


def data_sets(names: str | None, split: str = "train") -> dict[str, str]:
    """Identity -> name of each data set of a mixture: a file is its content, one of the hub has splits."""
    found: dict[str, str] = {}

    def note(name: str) -> str:
        found[digest_file(name) if Path(name).is_file() else f"{name} {split}"] = name
        return name

    if isinstance(names, str):
        rename_sets(names, note)
    return found
