"""The recipe of a search: what to try, checked before anything runs, and its rungs as studies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from maskft.data.arguments import TEMPLATE, DataArguments
from maskft.data.mixtures import parse_mixture
from maskft.data.sources import FILE_ENDINGS
from maskft.training.method_arguments import removes_a_share
from maskft_base.errors import UserError
from maskft_base.files import is_there, read_model, read_yaml

from .halving import rung_sizes
from .identity import data_hash
from .recipe import PRETRAINED, REVISION, Count, Data, Number, Recipe, Section, methods_of, parse_recipe

NO_MASK = "no mask"
CACHE, _DATA = "cache", "data"
PARTS = ("train", "choose", "report")
OF_DATA = frozenset(spec.name for spec in fields(DataArguments))
_DECIDED = ("mask_layers_to_transform", "mask_sparsity", "max_steps", "mask_prefix_cache")
_OF_TEST = ("tasks", "heldout", "dataset_name", "eval_dataset_name")


@dataclass(frozen=True)
class Candidate:
    """What a probe tries."""

    layers: tuple[int, ...]
    sparsity: float
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Its name in tables, and that of its runs."""
        first, last = self.layers[0], self.layers[-1]
        whole = self.layers == tuple(range(first, last + 1))
        layers = f"{first}-{last}" if whole and first < last else ",".join(map(str, self.layers))
        rate = "" if self.learning_rate is None else f", rate {self.learning_rate:g}"
        return f"layers {layers}, sparsity {self.sparsity:g}{rate}"

    @property
    def options(self) -> dict[str, Any]:
        """Its options of ``maskft train``."""
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {"mask_layers_to_transform": list(self.layers), "mask_sparsity": self.sparsity, **rate}


Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class SearchSettings(Section):
    """Section ``search`` of the recipe."""

    sparsities: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)]
    budget_steps: Count  # optimizer steps of all probes together, shared equally among the rungs
    # Numbers of consecutive layers: groups of one size tile the model, the last one ends at its end.
    group_sizes: Annotated[list[Count], Field(min_length=1)] | None = None
    layer_groups: Annotated[list[Layers], Field(min_length=1)] | None = None  # the groups themselves, instead
    learning_rates: list[Number] = []  # empty: that of `train`
    factor: Annotated[int, Field(ge=2)] = 2  # of a rung's candidates, one in factor goes on to the next
    min_steps: Count = 10  # fewest steps of a probe that say anything
    choose_size: Number = 0.5  # rows that rank the candidates: a count if >= 1, else a fraction of those held out
    prefix_cache: bool = True  # keep the outputs of the frozen layers below a group for all probes that share them

    @model_validator(mode="after")
    def _groups_are_given_once(self) -> SearchSettings:
        if (self.group_sizes is None) == (self.layer_groups is None):
            raise ValueError("it needs group_sizes or layer_groups, and not both")
        return self

    def candidates(self, num_layers: int) -> list[Candidate]:
        """What is tried on a model of ``num_layers`` layers."""
        groups = [tuple(sorted(set(layers))) for layers in self.layer_groups or []]
        for size in self.group_sizes or []:
            # The last group ends at the end of the model.
            firsts = (min(first, num_layers - size) for first in range(0, num_layers, size))
            groups += [tuple(range(first, first + size)) for first in firsts]
        beyond = next((layers for layers in groups if not 0 <= layers[0] <= layers[-1] < num_layers), None)
        if beyond is not None:
            raise UserError(f"search: a group has layers {list(beyond)}; the model has layers 0 to {num_layers - 1}")
        tried = itertools.product(dict.fromkeys(groups), self.sparsities, self.learning_rates or [None])
        candidates = list(itertools.starmap(Candidate, tried))
        names = [candidate.name for candidate in candidates]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"search: two candidates are named {twice!r}; values that close mean the same: drop one")
        if len(candidates) < 2:
            raise UserError("search: there is 1 candidate; give more layer groups, sparsities or learning rates")
        return candidates


@dataclass(frozen=True)
class Search:
    """A checked search: the recipe whose only method is the unmasked model, what to try, and how."""

    recipe: Recipe
    settings: SearchSettings
    candidates: list[Candidate]

    @property
    def sizes(self) -> list[int]:
        """Number of candidates of each rung; the last keeps one of them."""
        return rung_sizes(len(self.candidates), self.settings.factor)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of each probe, rung by rung."""
        per_rung = self.settings.budget_steps // len(self.sizes)
        return [per_rung // (size * len(self.recipe.seeds)) for size in self.sizes]

    @property
    def data(self) -> Data:
        """The training data."""
        return next(iter(self.recipe.data.values()))

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``maskft train`` for all probes; those that stand with the data win."""
        return self.recipe.train | self.data.options

    def rung(self, candidates: list[Candidate], steps: int, folder: Path | None = None) -> Recipe:
        """A rung as a study; without ``folder`` on the data as it is, to check its options."""
        methods: dict[str, dict] = {NO_MASK: {"method": PRETRAINED}}
        # Those above the same frozen layers follow each other.
        for candidate in sorted(candidates, key=lambda c: c.layers):
            # Measured at the end of its schedule, where rates are zero, and nowhere else.
            options = {**candidate.options, "max_steps": steps, "eval_strategy": "no", "save_steps": 0.5}
            if folder and self.settings.prefix_cache and min(candidate.layers) > 0:
                options["mask_prefix_cache"] = str(folder / CACHE / str(min(candidate.layers)))
            methods[candidate.name] = {"method": "mask", **options}
        changes: dict[str, Any] = {"methods": methods_of(methods)}
        if folder is not None:
            rows = {part: str(self.part_file(folder, part)) for part in PARTS}
            names = {"dataset_name": rows["train"], "eval_dataset_name": rows["choose"]}
            changes["data"] = {"probes": Data.model_validate(_of_probes(self.data.options) | names)}
            changes["train"] = _of_probes(self.recipe.train)
            changes["evaluation"] = self.evaluation(rows["choose"])
        return self.recipe.model_copy(update=changes)

    def evaluation(self, rows: str) -> dict[str, Any]:
        """Options of ``maskft evaluate`` that measure the loss on ``rows``."""
        shared = {key: self.options[key] for key in ("max_length", "dataset_text_field") if key in self.options}
        return {**shared, **self.recipe.evaluation, "dataset_name": rows, "no_generate": True}

    def part_file(self, folder: Path, part: str) -> Path:
        """File of one of :data:`PARTS` of the training data; what decides the rows and their form names its folder."""
        options = {k: v for k, v in self.options.items() if k in (*OF_DATA, TEMPLATE, REVISION, "dataset_text_field")}
        options |= {"max_train_samples": None, "choose_size": self.settings.choose_size}
        return folder / _DATA / data_hash(self.recipe.models[0], options) / f"{part}.jsonl"


def _of_probes(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those about data that the parts are made of already."""
    return {k: v for k, v in options.items() if k in ("max_train_samples", "as_chat") or k not in OF_DATA}


# Reading


def load_search(file: str | Path, data_dir: str | None = None, model: str | None = None) -> Search:
    """Read and check the recipe of a search: that of a study, with a section ``search`` instead of methods.

    Args:
        file: The YAML file.
        data_dir: Folder of the data file it names.
        model: Base model instead of the recipe's.

    Raises:
        UserError: The first mistake, in one line.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or "search" not in content:
        raise UserError(f"{file}: search is missing; write sparsities, group_sizes and budget_steps into it")
    for key in ("methods", "grid", "baseline", "models"):
        if key in content:
            raise UserError(f"{file}: {key} is for `maskft study`; drop it")
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise UserError(f"data_dir {data_dir!r} is no folder; name the one that holds the training data")
    settings = read_model(SearchSettings, content["search"], f"{file}: search")
    study = {key: value for key, value in content.items() if key != "search"}
    if model is not None:
        study = {key: value for key, value in study.items() if key != "model_facts"} | {"model": model}
    recipe = parse_recipe(study | {"methods": {NO_MASK: {"method": PRETRAINED}}}, data_dir, file)
    _check_rows(recipe)
    num_layers = recipe.facts.num_layers
    if num_layers is None:
        from maskft.models import load_config

        num_layers = load_config(recipe.models[0], revision=recipe.revision).get_text_config().num_hidden_layers
    search = Search(recipe, settings, settings.candidates(num_layers))
    if search.steps[0] < settings.min_steps:
        probes, rungs = search.sizes[0] * len(recipe.seeds), len(search.sizes)
        raise UserError(
            f"budget_steps {settings.budget_steps} is too small for one rung: the first of {rungs} has {probes} "
            f"probes of {search.steps[0]} steps, fewer than min_steps {settings.min_steps}; give at least "
            f"{settings.min_steps * probes * rungs}"
        )
    return search


def _check_rows(recipe: Recipe) -> None:
    """Refuse what would make candidates see other rows than held-out training rows, or what the search decides."""
    for key in _OF_TEST:
        if key in recipe.evaluation:
            raise UserError(f"evaluation sets {key}; a search measures loss on held-out training rows; drop it")
    for key in _DECIDED:
        if key in recipe.train:
            raise UserError(f"train sets {key}, which the search decides; drop it")
    if not removes_a_share(recipe.train):
        raise UserError("mask_selection must be topk: with any other no sparsity is given that could be searched")
    if len(recipe.data) > 1:
        raise UserError(f"it has {len(recipe.data)} data sets; a search is on one, which may be a mixture")
    for part in parse_mixture(next(iter(recipe.data.values())).options["dataset_name"]):
        if part.name.lower().endswith(FILE_ENDINGS) and not is_there(part.name):
            raise UserError(f"data file {part.name!r} does not exist; name the folder it is in: --data_dir DIR")
