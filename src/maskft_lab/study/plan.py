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
from maskft.training.method_arguments import UNTRAINED_METHODS
from maskft.training.options import option_defaults
from maskft_common.errors import UserError

from .identity import options_identity, plain, short_digest, written_out
from .path import WHOLE_TRAINING, with_chosen_point
from .recipe import CURRENT_RATE, PRETRAINED, Method, Options, Recipe, TimesParent
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
        return replace(self, runs=[run for run in self.runs if not run.is_assumed])


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
    for method in recipe.methods.values():
        for axes in planner.variants(method):
            for seed in planner.seeds(method):
                planner.run(method, axes, seed)

    finals = [run for run in planner.runs if run.tried is None]
    _check_names(finals)

    # The run that tried the winning settings is the final run of that seed, and listed once.
    winners = {run.id for run in finals if not run.is_assumed}
    runs = [run for run in planner.runs if run.tried is None or run.id not in winners]
    return Plan(recipe, runs, list(planner.tunings.values()))


class _Planner:
    """Makes each run once, after the runs it is made from."""

    def __init__(self, recipe: Recipe, look: Look):
        self.recipe = recipe
        self.look = look
        # A study compares masks, also bad ones; see make.py.
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
            num_variants = math.prod(len(values) for values in self.axes(method).values())
            num_settings = 0
            for values in (method.tune or {}).values():
                values = values.times_parent if isinstance(values, TimesParent) else values
                num_settings = max(num_settings, 1) * len(values)
            number += num_variants * (len(self.seeds(method)) + num_settings)
        if number > MAX_RUNS:
            raise UserError(f"the recipe describes {number:,} runs (at most {MAX_RUNS:,}); use fewer seeds or values")

    def axes(self, method: Method) -> dict[tuple[str, str], list]:
        """Grid axes of a method: its own and those of the methods it is made from."""
        inherited: set[tuple[str, str]] = set()
        for name in method.parents.values():
            inherited |= self.axes(self.recipe.methods[name]).keys()
        return {key: values for key, values in self.recipe.axes.items() if key[0] == method.name or key in inherited}

    def variants(self, method: Method) -> Iterator[Axes]:
        """Grid values of each of a method's variants."""
        axes = self.axes(method)
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def seeds(self, method: Method) -> list[int]:
        """Seeds of a method; the base model itself has one."""
        if method.method == PRETRAINED:
            return self.recipe.seeds[:1]
        return method.seeds or self.recipe.seeds

    def _place(self, method: Method, axes: Axes) -> tuple[Axes, tuple]:
        """The grid values that concern a method, and a hashable key for them (values may be lists)."""
        own_axes = self.axes(method)
        axes = {key: value for key, value in axes.items() if key in own_axes}
        return axes, (method.name, json.dumps([[*key, value] for key, value in axes.items()]))

    # Runs

    def run(self, method: Method, axes: Axes, seed: int) -> StudyRun:
        """One run and, before it, the runs it is made from."""
        axes, place = self._place(method, axes)
        key = (*place, seed)
        if key not in self._made:
            if method.tune is not None and place not in self.tunings:
                self.tunings[place] = self._chosen(method, axes)
            self._made[key] = self._make(method, axes, seed, tuned=self.tunings.get(place))
        return self._made[key]

    def _make(
        self, method: Method, axes: Axes, seed: int, tuned: Tuned | None = None, tried: Options | None = None
    ) -> StudyRun:
        """One run, with the settings that won or that are tried."""
        masks = {key: self._parent(name, axes, seed) for key, name in method.parents.items()}
        start = masks.pop("from", None)
        match = masks.pop("match", None)
        parents = [run for run in (start, match, *masks.values()) if run is not None]

        settings = tuned.winner.settings if tuned else tried or {}
        options = run_options(self.recipe, method, axes, seed, match, settings)
        if options.get("learning_rate") == CURRENT_RATE and (start is None or start.method.method != "full"):
            raise UserError(f"method {method.name!r}: learning_rate {CURRENT_RATE} goes with `from` a full fine-tuning")

        name = _slug(method.name)
        if method.method != PRETRAINED:
            name += f"-s{seed}"
        hash_of_run = self._hash(method, options, {"start": start, "match": match, **masks})

        stages = [run.stage for run in parents]
        is_guess = tuned is not None and not tuned.is_settled
        run = StudyRun(
            method=method,
            model=self.recipe.model,
            seed=seed,
            axes=axes,
            options=options,
            start=start,
            match=match,
            masks=masks,
            id=f"{name}-{hash_of_run}",
            stage=max([tuned.stage + 1 if tuned else 1, *stages]),
            is_assumed=is_guess or any(parent.is_assumed for parent in parents),
            tried=tried,
            tuned=tuned,
            point=tuned.point if tuned else None,
        )
        self.runs.append(run)
        return run

    def _parent(self, name: str, axes: Axes, seed: int) -> StudyRun:
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
        before = self.look(self._base_run())
        rivals = [self._tried(rival, rival_axes) for rival in self._rivals() for rival_axes in self.variants(rival)]
        if before is None or not all(each.is_settled for each in [tuned, *rivals]):
            return replace(tuned, is_settled=False, point=WHOLE_TRAINING)
        base_values = next(iter(before.points.values()))  # it has one point
        return with_chosen_point(tuned, rivals, base_values, path.choose)

    def _base_run(self) -> StudyRun:
        base = next(method for method in self.recipe.methods.values() if method.method == PRETRAINED)
        return self.run(base, {}, self.seeds(base)[0])

    def _rivals(self) -> list[Method]:
        """The tuned methods that train from the base model.

        A method made from a trained model waits for the choice of its parent: to choose the parent, the best gain of
        all methods must not depend on it.
        """
        methods = self.recipe.methods.values()
        bases = {method.name for method in methods if method.method == PRETRAINED}
        return [method for method in methods if method.tune is not None and bases.issuperset(method.parents.values())]

    def _tried(self, method: Method, axes: Axes) -> Tuned:
        """The trials of ``method.tune``, made once, with the best of them once all are finished."""
        axes, place = self._place(method, axes)
        if place in self._trials:
            return self._trials[place]

        seed = self.seeds(method)[0]
        of_parent: Options = {}
        if method.start:
            parent = self._parent(method.start, axes, seed)
            if parent.method.method != PRETRAINED:  # a model that was not trained has no rate to multiply
                of_parent = self.defaults | written_out(parent.method.method, parent.options)
        own = self.defaults | written_out(method.method, run_options(self.recipe, method, axes, seed))

        def run_of(settings: Options) -> StudyRun:
            return self._make(method, axes, seed, tried=settings)

        self._trials[place] = tune(method, own, of_parent, run_of, self.look)
        return self._trials[place]

    # Names

    def _hash(self, method: Method, options: Options, parents: dict[str, StudyRun | None]) -> str:
        """Hash of everything that decides a run's outcome. Any change of it renames published runs."""
        named = options_identity(written_out(method.method, options))
        if named.get("mask_removed_value_model"):
            named["mask_removed_value_model"] = model_identity(named["mask_removed_value_model"])

        # mask_init_scores has no fixed default (other options decide it); the published start leaves no trace.
        defaults = self.defaults | {"mask_init_scores": "normal", "mask_init_value": 0}
        settings: dict[str, Any] = {
            "method": method.method,
            "model": model_identity(self.recipe.model),
            "options": {
                key: value for key, value in named.items() if key not in defaults or value != plain(defaults[key])
            },
        }
        for key, parent in parents.items():
            settings[key] = parent.hash if parent else None

        points = {key: list(parent.point) for key, parent in parents.items() if parent and parent.point}
        if points:
            settings["points"] = points

        num_processes = self.recipe.launch.num_processes or 1
        is_trained = method.method not in (PRETRAINED, *UNTRAINED_METHODS)
        if is_trained and num_processes != 1 and not options.get("global_batch_size"):
            # The batch is as large as the number of processes. (`command` is a key of earlier names.)
            settings["launch"] = {"num_processes": num_processes, "command": None}
        return short_digest(settings)


def _check_names(runs: list[StudyRun]) -> None:
    """Raise for two runs with one folder, or with one name in the tables."""
    seen: set[tuple | str] = set()
    for run in runs:
        keys = {run.id, *((run.model, run.seed, label) for label in run.labels.values())}
        if keys & seen:
            raise UserError(f"two runs are named {run.title!r}: their settings mean the same; drop one")
        seen |= keys


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "run"
