"""Tuning a method of a study: which settings are tried, and which of them the held-out rows choose.

The rows are those held out from the training data, never those that a study reports on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.mixtures import rename_sets
from ..errors import UserError
from ..files import digest_file
from ..results.statistics import weighted_mean
from .recipe import Method, Options, Recipe, TimesParent

if TYPE_CHECKING:
    from .plan import StudyRun

MAX_DOUBLINGS = 3
MIN_GAIN = 0.005  # nats per token that twice the budget must gain, where losses of single rows are not at hand


@dataclass(frozen=True)
class Heldout:
    """Held-out loss of one finished run.

    Attributes:
        loss: Of the best checkpoint, in nats per token; infinite where the run failed.
        rows: Id of a row -> its loss in nats per token, and its number of supervised tokens; empty if not recorded.
    """

    loss: float
    rows: Mapping[str, tuple[float, int]] = field(default_factory=dict)


Look = Callable[["StudyRun"], Heldout | None]


@dataclass
class Trial:
    """Settings that are tried, with one run for each of the seeds that choose."""

    settings: Options
    stage: int
    is_assumed: bool  # they are a guess, since what they follow from is not finished
    runs: list[StudyRun] = field(default_factory=list)
    heldout: list[Heldout] | None = None  # of the runs; None: not all are finished

    @property
    def loss(self) -> float | None:
        """Mean held-out loss over the seeds, in nats per token."""
        return None if self.heldout is None else sum(found.loss for found in self.heldout) / len(self.heldout)


@dataclass(frozen=True)
class Tuned:
    """What was tried for a method, and what won."""

    method: Method
    trials: list[Trial]
    winner: Trial  # while not settled: a guess
    is_settled: bool

    @property
    def stage(self) -> int:
        """The last one of its trials."""
        return max(run.stage for trial in self.trials for run in trial.runs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able record for the study's summary."""
        trials = [
            {"settings": trial.settings, "runs": [run.id for run in trial.runs], "heldout_loss": _finite(trial.loss)}
            for trial in self.trials
        ]
        first = self.trials[0].runs[0]
        return {
            "method": first.name,
            "seeds": [run.seed for run in self.trials[0].runs],
            "num_runs": sum(len(trial.runs) for trial in self.trials),
            "trials": trials,
            "winner": self.winner.settings if self.is_settled else None,
        }

    def __str__(self) -> str:
        """E.g. ``full: learning_rate=0.003 is the best of 4 settings on held-out rows``."""
        name = self.trials[0].runs[0].name
        return f"{name}: {settings_text(self.winner.settings)} is the best of {len(self.trials)} on held-out rows"


def settings_text(settings: Options) -> str:
    """Settings for people, e.g. ``learning_rate=0.003, num_train_epochs=40``."""
    return ", ".join(f"{option}={value}" for option, value in settings.items())


def tune(
    method: Method, own: Options, parent: Options, runs_of: Callable[[Trial], list[StudyRun]], look: Look
) -> Tuned:
    """Try the grid, then the winner with twice as much of ``double`` until that gains less than its standard error.

    Args:
        method: The method, which has a ``tune``.
        own: Its options of ``maskft train``, defaults included.
        parent: Those of the run that it starts from.
        runs_of: Makes the runs of a trial.
        look: Held-out loss of a run; None where it is not finished.
    """
    assert method.tune is not None
    stage = 0

    def tried(settings: Options, is_assumed: bool) -> Trial:
        trial = Trial(settings, stage + 1, is_assumed)
        trial.runs = runs_of(trial)
        found = [None if trial.is_assumed else look(run) for run in trial.runs]
        trial.heldout = None if None in found else found
        return trial

    trials = [tried(settings, False) for settings in _grid(method, parent)]
    is_settled = all(trial.loss is not None for trial in trials)
    winner = min(trials, key=lambda trial: math.inf if trial.loss is None else trial.loss) if is_settled else trials[0]
    stage = max(run.stage for trial in trials for run in trial.runs)
    option, goes_on = method.tune.double, is_settled and math.isfinite(winner.loss)
    for doubling in range(MAX_DOUBLINGS if option else 0):
        if doubling and not goes_on:
            break
        value = _number(winner.settings.get(option, own.get(option)))
        if value is None or value <= 0:
            raise UserError(
                f"method {method.name!r}: tune cannot double {option}, of which it has no value; give it one"
            )
        trial = tried(winner.settings | {option: 2 * value}, not is_settled)
        trials.append(trial)
        if trial.loss is None:
            is_settled = False
            break
        goes_on = _gains(winner, trial)
        winner, stage = (trial if goes_on else winner), stage + 1
    return Tuned(method, trials, winner, is_settled)


def _grid(method: Method, parent: Options) -> list[Options]:
    """Every combination of the values to try."""
    lists = {}
    for option, values in method.tune.grid.items():
        if isinstance(values, TimesParent):
            base = _number(parent.get(option))
            if base is None:
                raise UserError(
                    f"method {method.name!r}: tune.{option} is given as times_parent, and that of {method.start!r} is "
                    f"{parent.get(option)!r}, no number; give the values"
                )
            values = [float(f"{factor * base:.6g}") for factor in values.times_parent]
        lists[option] = values
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _number(value: Any) -> float | None:
    """A number also where YAML reads a text, as of 3e-3."""
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError):
        return None


def _gains(before: Trial, after: Trial) -> bool:
    """Whether held-out loss falls by more than the standard error of the paired difference."""
    pairs = list(zip(before.heldout, after.heldout, strict=True))
    rows = [row for row in before.heldout[0].rows if all(row in found.rows for pair in pairs for found in pair)]
    if len(rows) < 2:
        return before.loss - after.loss > MIN_GAIN
    differences = [sum(a.rows[row][0] - b.rows[row][0] for a, b in pairs) / len(pairs) for row in rows]
    gain, stderr = weighted_mean(differences, [before.heldout[0].rows[row][1] for row in rows])
    return gain > stderr


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def check_test_rows(recipe: Recipe) -> None:
    """Refuse to tune on rows that the study reports on."""
    reported = {}
    for evaluated in (recipe.evaluation, *recipe.before.values()):
        reported |= _sets(evaluated.get("dataset_name"))
    for method in recipe.methods.values():
        if method.tune is None:
            continue
        data = recipe.data[method.data or next(iter(recipe.data))].options | method.options
        name = data.get("eval_dataset_name")
        chosen = _sets(name or data.get("dataset_name"))
        same = next((chosen[key] for key in chosen if key in reported), None)
        if same is not None:
            raise UserError(
                f"method {method.name!r} would be tuned on rows of {same!r}, which evaluation reports on; hold out "
                "rows of the training data (eval_split_size)"
            )
        split = data.get("dataset_eval_split") or ("test" if name and not Path(name).is_file() else None)
        if split == "test":
            raise UserError(
                f"method {method.name!r} would be tuned on the split 'test' of {name or data.get('dataset_name')!r}; "
                "hold out rows of the training data (eval_split_size)"
            )


def _sets(names: str | None) -> dict[str, str]:
    """Identity -> name of each data set of a mixture: a file is its content."""
    found: dict[str, str] = {}

    def note(name: str) -> str:
        found[digest_file(name) if Path(name).is_file() else name] = name
        return name

    if isinstance(names, str):
        rename_sets(names, note)
    return found
