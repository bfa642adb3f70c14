"""Gain against forgetting: the path of a run from the base model to the end of its training.

A point of a path is a share of the training steps and a fraction of the change of the weights. Every point is measured
on held-out rows of the training data (the gain) and on rows of earlier abilities (the forgetting). ``path.choose`` of
the recipe takes one point of each method, and the chosen models are measured on test rows.

In this file: the points, their result files, the choice, and the curves that a figure shows. ``results/gains.py`` has
the same curve for any comparison, ``report/fig_gain.py`` draws them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from maskft.data.arguments import DataArguments
from maskft.training.method_arguments import UNTRAINED_METHODS
from maskft_common import layout

from ..evaluation.evaluation_arguments import HELDOUT, NOT_OF_HELDOUT_DATA
from ..results.comparison import Comparison
from ..results.gains import gains_of
from ..results.schema import BEFORE, Result, read_result
from .damage import is_whole_result
from .identity import options_identity, short_digest
from .load_recipe import HOW, HOW_OF_HELDOUT
from .recipe import PRETRAINED, Choice, Options, Recipe
from .study_run import (
    PathPoint,
    Point,
    PointValues,
    StudyRun,
    Trial,
    Tuned,
    settings_text,
)

PATH = "path"  # folder of a run's points
WHOLE_TRAINING: Point = (1.0, 1.0)
BEFORE_TRAINING: Point = (0.0, 0.0)

# Options of data that decide the held-out rows. NOT_OF_HELDOUT_DATA has two of them, because `maskft evaluate` defines
# them itself.
_OF_DATA = {field.name for field in fields(DataArguments)}
_OF_DATA -= set(NOT_OF_HELDOUT_DATA)
_OF_DATA |= {"eval_split_size", "data_dir", "dataset_text_field"}


# Points and their files


def has_path(recipe: Recipe, run: StudyRun) -> bool:
    """Whether points between the base model and the end of the run's training are measured on held-out rows."""
    # The base model has a path too, of one point: no change.
    if recipe.path is None or run.method.method in UNTRAINED_METHODS:
        return False
    # A tuned method is measured with the runs that tried its settings.
    is_trial = run.tried is not None
    is_tuned = run.tuned is not None
    return is_trial or not is_tuned


def points(recipe: Recipe, run: StudyRun) -> list[Point]:
    """Every point of a run's path."""
    if run.method.method == PRETRAINED:
        return [BEFORE_TRAINING]
    return recipe.path.points


def point_name(point: Point) -> str:
    """Folder of a point, e.g. ``1-0.5``: end of training, half of the change."""
    share, scale = point
    return f"{share:g}-{scale:g}"


def heldout_options(recipe: Recipe, run: StudyRun) -> Options:
    """Options of ``maskft evaluate`` for the rows held out from a run's training data.

    The pre-trained model has no training data: it is measured on the rows of the recipe's first.
    """
    data = run.options
    if not data:  # the pre-trained model
        first_data = recipe.data[recipe.first_data]
        data = recipe.train | first_data.options

    options = {}
    for key, value in data.items():
        if key in _OF_DATA and value is not None:
            options[key] = value

    has_own_rows = "eval_dataset_name" in options or "dataset_eval_split" in options
    # Another file or another split holds the rows, whatever eval_split_size is.
    if has_own_rows:
        return options
    # The rows are a part of the training data. Its size is named even where it is the default of `maskft train`:
    # `maskft evaluate` holds nothing out by itself.
    return {"eval_split_size": DataArguments.eval_split_size} | options


def path_sets(
    recipe: Recipe,
    run: StudyRun,
    run_folder: Path,
) -> dict[str, tuple[Path, Options]]:
    """Set of rows -> folder of its results for all points, and options of ``maskft evaluate``.

    The folder's name has a digest of the options: other rows are another measurement.
    """
    # Points are measured in the precision, with the template, ... of the study's evaluation.
    shared = {}
    for key, value in recipe.evaluation.items():
        if key in HOW or key in HOW_OF_HELDOUT:
            shared[key] = value
    options_of = {HELDOUT: shared | heldout_options(recipe, run)}
    options_of.update(recipe.path.before)  # which have the shared options already, see load_recipe.py

    sets = {}
    for name, options in options_of.items():
        identity = options_identity(options)
        digest = short_digest(identity)
        folder = run_folder / PATH / f"{name}-{digest}"
        sets[name] = (folder, options)
    return sets


def path_values(
    recipe: Recipe,
    run: StudyRun,
    run_folder: Path,
) -> dict[Point, PointValues] | None:
    """Measurements of every point of a run's path; None if one is missing."""
    sets = path_sets(recipe, run, run_folder)
    measured: dict[Point, PointValues] = {}
    for point in points(recipe, run):
        values = {}
        for name, (folder, _) in sets.items():
            file = folder / point_name(point) / layout.RESULT
            if not is_whole_result(file):
                return None
            # Along a path, every set has this task alone.
            result = read_result(file)
            # Only the values: the choice uses no intervals.
            metrics = result["tasks"][HELDOUT]["metrics"]
            values[name] = {}
            for metric, record in metrics.items():
                values[name][metric] = record["value"]
        measured[point] = values
    return measured


# The choice of a point


def points_of(trials: Iterable[Trial], base: PointValues) -> list[PathPoint]:
    """All points of the finished trials of a method that did not diverge.

    Args:
        trials: The trials.
        base: Measurements of the model before training on the same sets of rows.
    """
    found = []
    for trial in trials:
        # Of a run without a loss there are no points.
        measured = trial.heldout.points if trial.heldout else {}
        for point, values in measured.items():
            if _has_diverged(values):
                continue
            gain = _gain(values, base)
            forgetting = _forgetting(values, base)
            over_budget = trial.heldout.points_over_budget.get(point, 0.0)
            found.append(PathPoint(trial, point, gain, forgetting, values, over_budget))
    return found


def _has_diverged(values: PointValues) -> bool:
    """Whether a metric is missing: a result file, which is JSON, has null for NaN and infinity."""
    for metrics in values.values():
        if None in metrics.values():
            return True
    return False


def _gain(values: PointValues, base: PointValues) -> float:
    """Accuracy on held-out rows, in [0, 1]; for rows without answers the fall of the loss, in nats per token."""
    own = values[HELDOUT]
    if "accuracy" in own:
        return own["accuracy"]
    return base[HELDOUT]["nll"] - own["nll"]


def _forgetting(values: PointValues, base: PointValues) -> float:
    """Mean rise of the loss over the sets of earlier abilities, in nats per token; 0 without such sets."""
    rises = []
    for name, metrics in values.items():
        has_loss = "nll" in metrics  # sets with `kl` have none
        if name != HELDOUT and has_loss:
            rise = metrics["nll"] - base[name]["nll"]
            rises.append(rise)
    if not rises:
        return 0.0
    return sum(rises) / len(rises)


def choose(
    candidates: Sequence[PathPoint],
    best_gain: float,
    rule: Choice,
) -> PathPoint:
    """The point with the least forgetting among those that gain enough, or the highest gain within a forgetting budget.

    If no point meets the constraint, the one that comes nearest.

    Args:
        candidates: The points of one method.
        best_gain: The best gain of any method.
        rule: The constraint.
    """
    if rule.accuracy_at_least is not None:
        # A share of the best of all methods, so that all are compared at about the same gain.
        wanted_gain = rule.accuracy_at_least * best_gain
        enough = [point for point in candidates if point.gain >= wanted_gain]
        if enough:
            return min(enough, key=_least_forgetting)
        return min(candidates, key=_most_gain)

    # The other constraint: a recipe gives one of the two.
    little = [point for point in candidates if point.forgetting <= rule.forgetting_at_most]
    if little:
        return min(little, key=_most_gain)
    return min(candidates, key=_least_forgetting)


# Sort keys, lowest first. Ties are common, as accuracy on few rows has few values; then the held-out loss decides.


def _least_forgetting(point: PathPoint) -> tuple[float, ...]:
    heldout_loss = point.values[HELDOUT]["nll"]
    return point.forgetting, -point.gain, heldout_loss


def _most_gain(point: PathPoint) -> tuple[float, ...]:
    heldout_loss = point.values[HELDOUT]["nll"]
    return -point.gain, point.forgetting, heldout_loss


def with_chosen_point(
    tuned: Tuned,
    rivals: Iterable[Tuned],
    base: PointValues,
    rule: Choice,
) -> Tuned:
    """Replace the winner of a method by the trial and point that ``rule`` takes.

    Args:
        tuned: The settled trials of the method.
        rivals: The settled trials of the other methods; ``accuracy_at_least`` is a share of the best of all.
        base: Measurements of the model before training.
        rule: The constraint.
    """
    # Among the points of all settings, so that the settings are chosen with the point.
    own = points_of(tuned.trials, base)
    if not own:
        return tuned  # all of its runs diverged

    # The best gain of any method.
    candidates = _nearest_to_budget(own)
    gains = [point.gain for point in candidates]
    for rival in rivals:
        rival_points = points_of(rival.trials, base)
        rival_candidates = _nearest_to_budget(rival_points)
        gains += [point.gain for point in rival_candidates]
    best_gain = max(gains)

    best = choose(candidates, best_gain, rule)
    return replace(
        tuned,
        winner=best.trial,
        point=best.point,
        points=own,
        base=base,
    )


def _nearest_to_budget(points: Sequence[PathPoint]) -> list[PathPoint]:
    """The points of a method that exceed their ``kl_budget`` least: those within it, where there are any.

    As among the checkpoints of a run, the budget comes before what else a point is chosen by.
    """
    if not points:
        return []
    least_excess = min(point.over_budget for point in points)
    return [point for point in points if point.over_budget == least_excess]


# Curves for a figure


def curves(
    tunings: Sequence[Tuned],
    results: Sequence[Result],
    comparison: Comparison,
    base: PointValues,
) -> dict[str, dict[str, Any]]:
    """Probe -> content of its curve file.

    Points along a path are measured with the seed and rows that choose. Chosen points are measured on the test, as
    means over seeds with simultaneous intervals.

    Args:
        tunings: Methods with measured points.
        results: Test results of the chosen models.
        comparison: Comparison of these with the base model.
        base: Measurements of the base model on the rows of the points.
    """
    # A comparison has all tasks of the study; a curve is about held-out rows and the probes along the path.
    tasks = {HELDOUT}
    for name, metrics in base.items():
        if name != HELDOUT and "nll" in metrics:
            tasks.add(BEFORE + name)
    # `name` is a set of path.before, `row.task` one of evaluation.before: a curve needs a name that both have.
    differences = [row for row in comparison.differences if row.task in tasks]
    num_bytes = _num_bytes(results)

    content = {}
    for curve in gains_of(differences):
        probe = curve["probe"]

        # Points along the paths, and then the chosen ones on the test.
        curve_points = []
        for tuned in tunings:
            for point in tuned.points:
                curve_points.append(_path_point(point, probe, base))
        for chosen in curve["points"]:
            method = chosen["method"]  # a name of the results
            added = {"label": "chosen", "num_bytes": num_bytes[method]}
            curve_points.append(chosen | added)

        # The curve with all of these points in place of the chosen ones.
        content[probe] = {
            "model": results[0]["model"]["name_or_path"],
            **curve,
            "points": curve_points,
        }
    return content


def _num_bytes(results: Sequence[Result]) -> dict[str, int | None]:
    """Name in tables -> bytes of the model's change, the largest of its seeds; None if it is not known for a seed."""
    of_seeds: dict[str, list[int | None]] = {}
    for result in results:
        size = result["model"].get("num_bytes")
        of_seeds.setdefault(result["name"], []).append(size)

    # The size of an entropy-coded mask differs a little from seed to seed.
    largest = {}
    for name, sizes in of_seeds.items():
        is_known = all(sizes)
        largest[name] = max(sizes) if is_known else None
    return largest


def _path_point(
    point: PathPoint,
    probe: str,
    base: PointValues,
) -> dict[str, Any]:
    """A point of a curve, in percentage points (or nats per token without accuracy) and nats per token."""
    run = point.trial.run
    share, scale = point.point
    path_name = run.name
    settings = settings_text(point.trial.settings)
    if settings:
        path_name = f"{run.name}, {settings}"

    # `gain` is an accuracy or already a difference of losses, see `_gain`.
    gained = point.gain
    accuracy_before = base[HELDOUT].get("accuracy")
    if accuracy_before is not None:
        gained = 100 * (point.gain - accuracy_before)
    # The rise of the loss: more is worse, unlike `gained`.
    forgotten = point.values[probe]["nll"] - base[probe]["nll"]
    return {
        "method": run.name,
        "path": path_name,
        "label": f"{share:g} of training, {scale:g} of the change",
        "share": share,
        "scale": scale,
        "rows": "held-out",
        "points_gained": gained,
        "nats_forgotten": forgotten,
        "num_seeds": 1,
        "is_chosen": False,
        "budget": run.options.get("kl_budget"),
    }
