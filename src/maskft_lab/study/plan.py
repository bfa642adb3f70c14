"""From a recipe to runs: which there are, what each depends on, and the name by which its result is found again.

A run is named by a hash of what decides its outcome: method, seed, every option that is not the default, digests of the
data files and of a local base model, and the hashes of the runs it is made from. So a change anywhere upstream gives
every run below a new name, and what did not change is found finished.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from maskft.models import model_identity
from maskft.training.method_arguments import (
    LEARNER_OPTIONS,
    MASK_METHODS,
    UNTRAINED_METHODS,
    read_peft_config,
    removes_a_share,
)
from maskft.training.options import option_defaults
from maskft_common.errors import UserError

from .identity import options_identity, plain, short_digest, written_out
from .recipe import CURRENT_RATE, PRETRAINED, REVISION, Method, Options, Recipe
from .runs import LAYERS, Look, StudyRun, Tuned
from .tuning import choose, points_of, tune

# What says which matrices are masked: a fixed mask takes it from the learned mask that it matches.
_PLACES = ("mask_layers_to_transform", "mask_layers_pattern", "mask_target_modules", "mask_exclude_modules")
# Options of `maskft train` that a recipe cannot give: the study itself decides them.
_OF_THE_STUDY = (
    "method model_name_or_path output_dir resume_from_checkpoint match_adapter start_mask keep_mask before_model "
    "prepared_data_dir prepare_only keep_last seed"
).split()


@dataclass(frozen=True)
class Plan:
    """All runs of a study, each after those it is made from."""

    recipe: Recipe
    runs: list[StudyRun]
    tunings: list[Tuned]

    @property
    def ready(self) -> Plan:
        """The runs whose settings are known."""
        return replace(self, runs=[run for run in self.runs if not run.is_assumed])


def build_plan(recipe: Recipe, look: Look = lambda run: None) -> Plan:
    """Expand a recipe into runs.

    Where settings are tuned and their runs are not finished, the first of each list is assumed to win.

    Args:
        recipe: The recipe.
        look: Held-out loss of a run; None where it is not finished.

    Raises:
        UserError: If an option is the study's own.
    """
    planner = _Planner(recipe, option_defaults() | {"keep_worse": True}, look)  # see execute.py
    for method in recipe.methods.values():
        for axes in planner.variants(method):
            for seed in planner.seeds(method):
                planner.run(method, axes, seed)
    finals = [run for run in planner.runs if run.tried is None]
    _check_names(finals)
    # The winner is one of the runs that were tried, from now on with an evaluation.
    winners = {run.id for run in finals if not run.is_assumed}
    runs = [run for run in planner.runs if run.tried is None or run.id not in winners]
    return Plan(recipe, runs, list(planner.tunings.values()))


@dataclass
class _Planner:
    """Makes each run once, after those it is made from."""

    recipe: Recipe
    defaults: dict[str, Any]
    look: Look
    found: dict[tuple, StudyRun] = field(default_factory=dict)
    tunings: dict[tuple, Tuned] = field(default_factory=dict)
    tried: dict[tuple, Tuned] = field(default_factory=dict)
    runs: list[StudyRun] = field(default_factory=list)

    def axes(self, method: Method) -> dict[tuple[str, str], list]:
        """Grid axes of a method: its own and those of what it is made from."""
        inherited = {key for name in method.parents.values() for key in self.axes(self.recipe.methods[name])}
        return {key: v for key, v in self.recipe.axes.items() if key[0] == method.name or key in inherited}

    def variants(self, method: Method) -> list[dict]:
        """Grid values of each of a method's variants."""
        axes = self.axes(method)
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def place(self, method: Method, axes: dict) -> tuple[dict, tuple]:
        """Grid values that a method has, and a key for them."""
        axes = {key: value for key, value in axes.items() if key in self.axes(method)}
        return axes, (method.name, json.dumps([[*key, value] for key, value in axes.items()]))

    def seeds(self, method: Method) -> list[int]:
        """Seeds of a method; a base model taken as it is has but one."""
        return self.recipe.seeds[:1] if method.method == PRETRAINED else method.seeds or self.recipe.seeds

    def run(self, method: Method, axes: dict, seed: int) -> StudyRun:
        """One run and, before it, those it is made from."""
        axes, place = self.place(method, axes)
        if (*place, seed) not in self.found:
            if method.tune is not None and place not in self.tunings:
                self.tunings[place] = self.chosen(method, axes)
            self.found[*place, seed] = self.make(method, axes, seed, tuned=self.tunings.get(place))
        return self.found[*place, seed]

    def make(
        self, method: Method, axes: dict, seed: int, tuned: Tuned | None = None, tried: Options | None = None
    ) -> StudyRun:
        """One run, with the settings that won or that are tried."""
        made = {key: self.parent(name, axes, seed) for key, name in method.parents.items()}
        start, match = made.pop("from", None), made.pop("match", None)
        chosen = tuned.winner.settings if tuned else tried or {}
        options = _options(self.recipe, method, axes, seed, match, chosen)
        if options.get("learning_rate") == CURRENT_RATE and (start is None or start.method.method != "full"):
            raise UserError(f"method {method.name!r}: learning_rate {CURRENT_RATE} goes with `from` a full fine-tuning")
        name = f"{_slug(method.name)}-s{seed}" if method.method != PRETRAINED else _slug(method.name)
        parents = [run for run in (start, match, *made.values()) if run is not None]
        run = StudyRun(
            method,
            self.recipe.model,
            seed,
            axes,
            options,
            start,
            match,
            made,
            id=f"{name}-{self.hash(method, options, {'start': start, 'match': match} | made)}",
            stage=max([tuned.stage + 1 if tuned else 1, *(run.stage for run in parents)]),
            is_assumed=bool(tuned and not tuned.is_settled) or any(run.is_assumed for run in parents),
            tried=tried,
            tuned=tuned,
            point=tuned.point if tuned else None,
        )
        self.runs.append(run)
        return run

    def chosen(self, method: Method, axes: dict) -> Tuned:
        """The settings, and the point of a path, that held-out rows choose."""
        tuned = self.tune(method, axes)
        path = self.recipe.path
        if path is None or path.choose is None:
            return tuned
        methods = self.recipe.methods.values()
        bases = {each.name: each for each in methods if each.method == PRETRAINED}
        base = next(iter(bases.values()))
        before = self.look(self.run(base, {}, self.seeds(base)[0]))
        # Of those that are made from a trained model the best would wait for what they are made from.
        rivals = [each for each in methods if each.tune is not None and bases.keys() >= {*each.parents.values()}]
        all_tuned = [tuned, *(self.tune(each, values) for each in rivals for values in self.variants(each))]
        if before is None or not all(each.is_settled for each in all_tuned):
            return replace(tuned, is_settled=False, point=(1.0, 1.0))
        base_values = next(iter(before.points.values()))
        found = [points_of(each.trials, base_values) for each in all_tuned]
        if not found[0]:
            return tuned  # all of its runs diverged
        best = choose(found[0], max(point.gain for points in found for point in points), path.choose)
        return replace(tuned, winner=best.trial, point=best.point, points=found[0], base=base_values)

    def tune(self, method: Method, axes: dict) -> Tuned:
        """The settings of ``method.tune``, as far as what is finished tells which these are; tried once."""
        axes, place = self.place(method, axes)
        if place in self.tried:
            return self.tried[place]
        seed = self.seeds(method)[0]
        parent = self.parent(method.start, axes, seed) if method.start else None
        # What was not trained has no rate to be multiplied.
        is_trained = parent is not None and parent.method.method != PRETRAINED
        of_parent = self.defaults | written_out(parent.method.method, parent.options) if is_trained else {}
        own = self.defaults | written_out(method.method, _options(self.recipe, method, axes, seed, None))

        def run_of(settings: Options) -> StudyRun:
            return self.make(method, axes, seed, tried=settings)

        self.tried[place] = tune(method, own, of_parent, run_of, self.look)
        return self.tried[place]

    def parent(self, name: str, axes: dict, seed: int) -> StudyRun:
        """The run of the method ``name`` with the same seed, else its only one."""
        method = self.recipe.methods[name]
        seeds = self.seeds(method)
        if seed not in seeds and len(seeds) > 1:
            raise UserError(f"method {name!r} has seeds {seeds}; a run made from it has seed {seed}: add it there")
        return self.run(method, axes, seed if seed in seeds else seeds[0])

    def hash(self, method: Method, options: Options, parents: dict[str, StudyRun | None]) -> str:
        """Hash of what decides a run's outcome."""
        named = options_identity(written_out(method.method, options))
        if name := named.get("mask_removed_value_model"):
            named["mask_removed_value_model"] = model_identity(name)
        # What other options decide has no default here; of the start, the published one is not named.
        defaults = self.defaults | {"mask_init_scores": "normal", "mask_init_value": 0}
        settings = {
            "method": method.method,
            "model": model_identity(self.recipe.model),
            "options": {k: v for k, v in named.items() if k not in defaults or v != plain(defaults[k])},
            **{key: run and run.hash for key, run in parents.items()},
        }
        points = {key: list(run.point) for key, run in parents.items() if run and run.point}
        settings |= {"points": points} if points else {}  # of their paths, those that it is made from
        num_processes = self.recipe.launch.num_processes or 1
        is_trained = method.method not in (PRETRAINED, *UNTRAINED_METHODS)
        # How many processes share a batch, where that decides its size.
        if is_trained and not options.get("global_batch_size") and num_processes != 1:
            settings["launch"] = {"num_processes": num_processes, "command": None}
        return short_digest(settings)


def _check_names(runs: list[StudyRun]) -> None:
    """Refuse two runs with one folder, or with one name in the tables."""
    seen: set[tuple | str] = set()
    for run in runs:
        keys = {run.id, *((run.model, run.seed, label) for label in run.labels.values())}
        if keys & seen:
            raise UserError(f"two runs are named {run.title!r}: their settings mean the same; drop one")
        seen |= keys


# Options


def _options(
    recipe: Recipe, method: Method, axes: dict, seed: int, match: StudyRun | None, chosen: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Options of ``maskft train``: the study's, the data's, the method's, the grid's, the chosen; the later win."""
    if method.method == PRETRAINED:
        return {}
    is_mask = method.method in MASK_METHODS
    own = method.options | {option: value for (name, option), value in axes.items() if name == method.name}
    own |= chosen
    data = recipe.data[method.data or next(iter(recipe.data))].options
    refused = (recipe.train.keys() & {*_OF_THE_STUDY, "mask_seed"}) | ((own | data).keys() & {*_OF_THE_STUDY, REVISION})
    if refused:
        raise UserError(f"method {method.name!r} sets {min(refused)}, which seeds, from, last or train decide; drop it")
    options = {key: value for key, value in recipe.train.items() if is_mask or not key.startswith("mask_")}
    options |= data | {"seed": seed}
    options |= {"mask_seed": seed} if is_mask else {}
    options |= own | ({"keep_last": True} if method.last else {})
    options = {key: plain(value) for key, value in options.items() if value is not None}
    if "peft_config" in options:  # what a file says is part of a run's name
        options["peft_config"] = read_peft_config(options["peft_config"])
    num_candidates = options.get("num_candidates")
    if isinstance(num_candidates, int) and num_candidates > 1 and own.get("mask_seed") is None:
        # The candidates are mask_seed, mask_seed + 1, ...: without this those of two seeds would be nearly the same.
        options["mask_seed"] = seed * num_candidates
    options |= {key: [options[key]] for key in LAYERS if key in options and not isinstance(options[key], list)}
    if match is not None:
        of_match = written_out(match.method.method, match.options)  # a preset may say where it lies
        for key in _PLACES:
            if key in method.options and options.get(key) != of_match.get(key):
                raise UserError(
                    f"method {method.name!r} has {key} {options.get(key)}, and the mask it matches, {match.title!r}, "
                    f"has {of_match.get(key)}; leave it out"
                )
        options = {key: value for key, value in options.items() if key not in _PLACES}
        if not removes_a_share(options):  # it removes as many as are matched, whatever all other masks learn by
            options = {key: value for key, value in options.items() if key not in LEARNER_OPTIONS or key in own}
        options |= {key: of_match[key] for key in _PLACES if key in of_match}
    return options


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "run"
