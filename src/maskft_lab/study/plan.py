"""From a recipe to runs: which there are, what each depends on, and its name.

A run is named by a hash of everything that decides its outcome: method, seed, every option that is not the default,
digests of the data files and of a local base model, and the hashes of the runs it is made from. So a change anywhere
upstream gives every run below a new name, and all other runs are found finished.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from maskft.models import model_identity
from maskft.training.options import option_defaults
from maskft_common.errors import UserError

from .identity import data_digest, options_identity, plain, short_digest, written_out
from .path import WHOLE_TRAINING, with_chosen_point
from .recipe import (
    CURRENT_RATE,
    PRETRAINED,
    Method,
    Options,
    Recipe,
    TimesParent,
)
from .run_options import run_options
from .study_run import Look, StudyRun, Tuned
from .tuning import tune

MAX_RUNS = 10_000  # a larger number is a mistake in seeds or grid; a plan of it would take hours

Axes = dict[tuple[str, str], Any]  # (method, option) -> the grid's value


@dataclass(frozen=True)
class Plan:
    """All runs of a study, each after the runs it is made from."""

    recipe: Recipe
    runs: list[StudyRun]
    tunings: list[Tuned]

    @property
    def ready(self) -> Plan:
        """The runs whose settings are known."""
        ready = [run for run in self.runs if not run.is_assumed]
        return replace(self, runs=ready)


def build_plan(recipe: Recipe, look: Look = lambda run: None) -> Plan:
    """Expand a recipe into runs.

    While the runs that tune a method are not finished, the first of each list is assumed to win.

    Args:
        recipe: The recipe.
        look: Held-out loss of a run; None while it is not finished.

    Raises:
        UserError: If an option is the study's own, or there are too many runs.
    """
    planner = _Planner(recipe, look)
    planner.check_number()

    # Every method, in each variant of the grid, with each seed.
    for method in recipe.methods.values():
        for axes in planner.variants(method):
            for seed in planner.seeds(method):
                planner.run(method, axes, seed)

    # All but the trials.
    finals = [run for run in planner.runs if run.tried is None]
    _check_names(finals)

    # The run that tried the winning settings is the final run of that seed. The planner has made it twice, with one
    # id; it is listed once, as the final run.
    ids_of_finals = {run.id for run in finals if not run.is_assumed}
    runs = []
    for run in planner.runs:
        is_trial = run.tried is not None
        is_listed_as_final = is_trial and run.id in ids_of_finals
        if not is_listed_as_final:
            runs.append(run)

    tunings = list(planner.tunings.values())
    return Plan(recipe, runs, tunings)


class _Planner:
    """Makes each run once, after the runs it is made from.

    ``run`` returns the run of a method, grid values and a seed, and calls itself for its parents. So ``runs`` lists
    parents first, whatever the order of the methods in the recipe.
    """

    def __init__(self, recipe: Recipe, look: Look):
        self.recipe = recipe
        self.look = look
        # A study compares masks, also bad ones; see train.py.
        self.defaults = option_defaults() | {"keep_worse": True}
        self.runs: list[StudyRun] = []
        self.tunings: dict[tuple, Tuned] = {}  # place -> the choice
        self._made: dict[tuple, StudyRun] = {}  # place and seed -> run
        self._trials: dict[tuple, Tuned] = {}  # place -> the trials

    # Grid and seeds

    def check_number(self) -> None:
        """Raise before a plan of more runs than anyone means."""
        number = 0
        for method in self.recipe.methods.values():
            num_trials = 0
            if method.tune:
                numbers = [_num_values(values) for values in method.tune.values()]
                num_trials = math.prod(numbers)
            runs_of_variant = len(self.seeds(method)) + num_trials
            # Counted, not made: a grid of ten options with ten values each has 10 billion variants.
            axes = self.axes(method)
            lengths = [len(values) for values in axes.values()]
            num_variants = math.prod(lengths)
            # Trials are counted for every variant: each of them is tuned by itself.
            number += num_variants * runs_of_variant

        if number > MAX_RUNS:
            raise UserError(f"the recipe describes {number:,} runs (at most {MAX_RUNS:,}); use fewer seeds or values")

    def axes(self, method: Method) -> dict[tuple[str, str], list]:
        """Grid axes of a method: its own and those of the methods it is made from, in the order of the recipe."""
        # A method made from one with a grid has a run for each of that method's variants.
        inherited: set[tuple[str, str]] = set()
        for name in method.parents.values():
            parent = self.recipe.methods[name]
            # The recursion ends, because `Recipe` has checked that no method is made from itself.
            inherited |= self.axes(parent).keys()

        axes = {}
        for key, values in self.recipe.axes.items():
            owner, _ = key
            if owner == method.name or key in inherited:
                axes[key] = values
        return axes

    def variants(self, method: Method) -> Iterator[Axes]:
        """Grid values of each of a method's variants."""
        axes = self.axes(method)
        # Without axes the product is one empty tuple: the method as it is.
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def seeds(self, method: Method) -> list[int]:
        """Seeds of a method; the base model itself has one."""
        if method.method == PRETRAINED:
            return self.recipe.seeds[:1]
        return method.seeds or self.recipe.seeds

    def _place(self, method: Method, axes: Axes) -> tuple[Axes, tuple]:
        """The grid values that concern a method, and a hashable key for them (values may be lists)."""
        # A child asks for its parent with its own grid values, of which the parent may have a part.
        own_keys = self.axes(method)
        own_axes = {}
        # In the order of the recipe, whichever child asks, so that equal values give equal keys.
        rows = []
        for key, value in axes.items():
            if key in own_keys:
                name, option = key
                own_axes[key] = value
                rows.append([name, option, value])
        place = (method.name, json.dumps(rows))
        return own_axes, place

    # Runs

    def run(
        self,
        method: Method,
        axes: Axes,
        seed: int,
    ) -> StudyRun:
        """One run and, before it, the runs it is made from."""
        axes, place = self._place(method, axes)
        key = (*place, seed)
        if key in self._made:  # several children share a parent
            return self._made[key]

        # All seeds share one choice, which is made with the first of them.
        if method.tune is not None and place not in self.tunings:
            self.tunings[place] = self._chosen(method, axes)
        tuned = self.tunings.get(place)

        run = self._make(method, axes, seed, tuned=tuned)
        self._made[key] = run
        return run

    def _make(
        self,
        method: Method,
        axes: Axes,
        seed: int,
        tuned: Tuned | None = None,
        tried: Options | None = None,
    ) -> StudyRun:
        """One run, with the settings that won or that are tried."""
        # Parents: the keys `from`, `match`, and those of masks.
        parents = {}
        for key, name in method.parents.items():
            parents[key] = self._parent(name, axes, seed)
        masks = dict(parents)
        # The keys that remain after these two are those of masks.
        start = masks.pop("from", None)
        match = masks.pop("match", None)

        # Options.
        settings: Options = {}
        if tuned is not None:
            settings = tuned.winner.settings
        elif tried is not None:
            settings = tried
        options = run_options(
            self.recipe,
            method,
            axes,
            seed,
            match,
            settings,
        )

        is_after_full = start is not None and start.method.method == "full"
        if options.get("learning_rate") == CURRENT_RATE and not is_after_full:
            raise UserError(f"method {method.name!r}: learning_rate {CURRENT_RATE} goes with `from` a full fine-tuning")

        # Folder name: method, seed, hash.
        prefix = slug(method.name)
        if method.method != PRETRAINED:
            prefix += f"-s{seed}"
        hashed_parents = {
            "start": start,
            "match": match,
            **masks,
        }
        hash_of_run = self._hash(method, options, hashed_parents)

        # Stage: after the trials that choose its settings, and not before its parents.
        own_stage = 1 if tuned is None else tuned.stage + 1
        stages = [own_stage]
        for parent in parents.values():
            stages.append(parent.stage)

        # The settings of a run are a guess as long as those of one of its parents are.
        is_guess = tuned is not None and not tuned.is_settled
        has_guessed_parent = any(parent.is_assumed for parent in parents.values())
        point = None
        if tuned is not None:
            point = tuned.point
        run = StudyRun(
            method=method,
            model=self.recipe.model,
            seed=seed,
            axes=axes,
            options=options,
            start=start,
            match=match,
            masks=masks,
            id=f"{prefix}-{hash_of_run}",
            stage=max(stages),
            is_assumed=is_guess or has_guessed_parent,
            tried=tried,
            tuned=tuned,
            point=point,
            data=data_digest(options),
        )
        self.runs.append(run)
        return run

    def _parent(
        self,
        name: str,
        axes: Axes,
        seed: int,
    ) -> StudyRun:
        """The run of the method ``name`` with the same seed, else its only one."""
        method = self.recipe.methods[name]
        seeds = self.seeds(method)
        if seed in seeds:
            return self.run(method, axes, seed)
        if len(seeds) > 1:
            raise UserError(f"method {name!r} has seeds {seeds}; a run made from it has seed {seed}: add it there")
        return self.run(method, axes, seeds[0])

    # Choices

    def _chosen(self, method: Method, axes: Axes) -> Tuned:
        """The settings, and with ``path.choose`` the point of a path, that held-out rows choose."""
        tuned = self._tried(method, axes)
        path = self.recipe.path
        if path is None or path.choose is None:
            return tuned

        # The choice needs the base model's measurements, and (for accuracy_at_least) the best gain of any method.
        base_run = self._base_run()
        before = self.look(base_run)
        rivals = []
        # The method itself may be among them: `_tried` returns its trials again, and a maximum does not change by that.
        for rival in self._rivals():
            for rival_axes in self.variants(rival):
                rivals.append(self._tried(rival, rival_axes))

        all_tuned = [tuned, *rivals]
        all_settled = all(each.is_settled for each in all_tuned)
        if before is None or not all_settled:
            # A guess, as for settings: the runs that depend on it are not made yet.
            return replace(tuned, is_settled=False, point=WHOLE_TRAINING)

        base_values = next(iter(before.points.values()))  # the base model has one point
        return with_chosen_point(tuned, rivals, base_values, path.choose)

    def _base_run(self) -> StudyRun:
        """The run of the base model, which a recipe with a path has."""
        methods = self.recipe.methods.values()
        bases = (method for method in methods if method.method == PRETRAINED)
        base = next(bases)
        # The base model has one seed, see `seeds`: nothing about it is random.
        [seed] = self.seeds(base)
        return self.run(base, axes={}, seed=seed)

    def _rivals(self) -> list[Method]:
        """The tuned methods that train from the base model.

        A method made from a trained model waits for the choice of its parent: to choose the parent, the best gain of
        all methods must not depend on it.
        """
        methods = self.recipe.methods.values()
        bases = {method.name for method in methods if method.method == PRETRAINED}
        rivals = []
        for method in methods:
            is_over_base = bases.issuperset(method.parents.values())
            if method.tune is not None and is_over_base:
                rivals.append(method)
        return rivals

    def _tried(self, method: Method, axes: Axes) -> Tuned:
        """The trials of ``method.tune``, made once, with the best of them once all are finished."""
        axes, place = self._place(method, axes)
        if place in self._trials:
            return self._trials[place]

        # Settings are tried with one seed, and hold for all.
        seed = self.seeds(method)[0]

        # The parent's options with defaults: `times_parent` may refer to a rate that the recipe does not set.
        of_parent: Options = {}
        if method.start:
            parent = self._parent(method.start, axes, seed)
            if parent.method.method != PRETRAINED:  # a model that was not trained has no rate to multiply
                written = written_out(parent.method.method, parent.options)
                of_parent = self.defaults | written
        given = run_options(self.recipe, method, axes, seed)
        own = self.defaults | written_out(method.method, given)

        def run_of(settings: Options) -> StudyRun:
            return self._make(method, axes, seed, tried=settings)

        tuned = tune(
            method,
            own,
            of_parent,
            run_of,
            self.look,
        )
        # Kept apart from `tunings`, which has the choices: a rival's trials are needed before its own choice is made.
        self._trials[place] = tuned
        return tuned

    # Names

    def _hash(
        self,
        method: Method,
        options: Options,
        parents: dict[str, StudyRun | None],
    ) -> str:
        """Hash of everything that decides a run's outcome. Any change of it renames published runs."""
        # Data and models enter by their content, so that a study may be moved to another machine.
        all_options = written_out(method.method, options)
        named = options_identity(all_options)
        removed_value_model = named.get("mask_removed_value_model")
        if removed_value_model:
            named["mask_removed_value_model"] = model_identity(removed_value_model)

        # Options at their default are left out, so that a new option does not rename earlier runs.
        # mask_init_scores has no fixed default (other options decide it); the published start leaves no trace.
        defaults = self.defaults | {"mask_init_scores": "normal", "mask_init_value": 0}
        changed = {}
        for key, value in named.items():
            is_default = key in defaults and value == plain(defaults[key])
            if not is_default:
                changed[key] = value

        settings: dict[str, Any] = {
            "method": method.method,
            "model": model_identity(self.recipe.model),
            "options": changed,
        }
        # The parents, and with `path.choose` the points of their paths that this run starts from.
        points = {}
        for key, parent in parents.items():
            settings[key] = parent.hash if parent else None
            if parent and parent.point:
                points[key] = list(parent.point)
        if points:  # only then: another key would rename published runs
            settings["points"] = points

        # Each process adds a micro-batch to the batch, unless global_batch_size fixes it.
        num_processes = self.recipe.launch.num_processes or 1
        depends_on_number = method.is_trained and not options.get("global_batch_size")
        if depends_on_number and num_processes != 1:
            settings["launch"] = {
                "num_processes": num_processes,
                "command": None,  # a key of earlier versions, in the names of published runs
            }
        return short_digest(settings)


def _check_names(runs: list[StudyRun]) -> None:
    """Raise for two runs with one folder, or with one name in the tables."""
    seen: set[tuple | str] = set()
    for run in runs:
        # One set for both: ids are texts, names in tables are tuples with the seed.
        keys: set[tuple | str] = {run.id}
        for label in run.labels.values():
            keys.add((run.model, run.seed, label))
        if keys & seen:
            raise UserError(f"two runs are named {run.title!r}: their settings mean the same; drop one")
        seen |= keys


def _num_values(values: list | TimesParent) -> int:
    """How many values of an option are tried."""
    if isinstance(values, TimesParent):
        return len(values.times_parent)
    return len(values)


def slug(text: str) -> str:
    """A name as part of a folder's name: lower-case letters, digits and ``_``."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower())
    name = name.strip("_")
    return name or "run"  # a name may have none of these characters
