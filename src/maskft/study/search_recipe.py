"""The recipe of a search, checked before anything runs, and its rungs as studies."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..data.arguments import TEMPLATE, DataArguments
from ..data.mixtures import parse_mixture
from ..data.sources import FILE_ENDINGS
from ..errors import UserError, did_you_mean
from ..files import is_there
from .plan import data_hash
from .recipe import (
    PRETRAINED,
    REVISION,
    Data,
    Method,
    Recipe,
    is_number,
    parse_recipe,
    read_content,
)

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


@dataclass(frozen=True)
class SearchSettings:
    """Section ``search`` of the recipe.

    Attributes:
        sparsities: Fractions removed, each in [0, 1).
        budget_steps: Optimizer steps of all probes together, shared equally among the rungs.
        group_sizes: Numbers of consecutive layers; groups of one size tile the model, the last one ends at its end.
        layer_groups: The groups themselves, instead of ``group_sizes``.
        learning_rates: Rates to try; empty: that of ``train``.
        eta: Of a rung's candidates, one in ``eta`` goes on to the next; at least 2.
        min_steps: Fewest steps of a probe that say anything; at least 1.
        choose_size: Rows that rank the candidates: a count if >= 1, else a fraction of the rows held out.
        prefix_cache: Whether the outputs of the frozen layers below a group are kept for all probes that share them.
    """

    sparsities: list[float]
    budget_steps: int
    group_sizes: list[int] | None = None
    layer_groups: list[list[int]] | None = None
    learning_rates: list[float] | None = None
    eta: int = 2
    min_steps: int = 10
    choose_size: float = 0.5
    prefix_cache: bool = True


@dataclass(frozen=True)
class Search:
    """A checked search: the recipe whose only method is the unmasked model, what to try, and how."""

    recipe: Recipe
    settings: SearchSettings
    candidates: list[Candidate]

    @property
    def sizes(self) -> list[int]:
        """Number of candidates of each rung; the last keeps one of them."""
        sizes = [len(self.candidates)]
        while (left := math.ceil(sizes[-1] / self.settings.eta)) > 1:
            sizes.append(left)
        return sizes

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
        methods = {NO_MASK: Method(NO_MASK, PRETRAINED)}
        # Those above the same frozen layers follow each other.
        for candidate in sorted(candidates, key=lambda c: c.layers):
            # Measured at the end of its schedule, where rates are zero, and nowhere else.
            options = {**candidate.options, "max_steps": steps, "eval_strategy": "no", "save_steps": 0.5}
            if folder and self.settings.prefix_cache and min(candidate.layers) > 0:
                options["mask_prefix_cache"] = str(folder / CACHE / str(min(candidate.layers)))
            methods[candidate.name] = Method(candidate.name, "mask", options=options)
        recipe = replace(self.recipe, methods=methods)
        if folder is None:
            return recipe
        rows = {part: str(self.part_file(folder, part)) for part in PARTS}
        names = {"dataset_name": rows["train"], "eval_dataset_name": rows["choose"]}
        data = {"probes": Data(names | _of_probes(self.data.options))}
        return replace(recipe, data=data, train=_of_probes(recipe.train), evaluation=self.evaluation(rows["choose"]))

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
    content = read_content(file)
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise UserError(f"data_dir {data_dir!r} is no folder; name the one that holds the training data")
    try:
        if not isinstance(content, dict) or not isinstance(content.get("search"), dict):
            raise UserError("it has no section 'search'; write sparsities, group_sizes and budget_steps into one")
        for key in ("methods", "grid", "baseline", "models"):
            if key in content:
                raise UserError(f"it has a section {key!r}, which is for `maskft study`; drop it")
        content = dict(content)
        section = content.pop("search")
        if model is not None:
            content["model"] = model
            content.pop("model_facts", None)  # those of the recipe's
        content["methods"] = {NO_MASK: {"method": PRETRAINED}}
        recipe = parse_recipe(content, Path(file).stem, data_dir, Path(file).parent)
        return _checked(recipe, _settings(section))
    except UserError as error:
        raise UserError(f"recipe {str(file)!r}: {error}") from None


def _settings(section: dict) -> SearchSettings:
    known = {spec.name for spec in fields(SearchSettings)}
    for key in section:
        if key not in known:
            raise UserError(f"unknown key in search: {key!r}{did_you_mean(str(key), known)}")
    for key in ("sparsities", "budget_steps"):
        if section.get(key) is None:
            raise UserError(f"search has no {key}")
    settings = SearchSettings(**section)
    for key in ("sparsities", "group_sizes", "layer_groups", "learning_rates"):
        values = section.get(key)
        if values is not None and (not isinstance(values, list) or not values):
            raise UserError(f"{key} must be a list of values, not {values!r}")
        twice = next((value for value in values or [] if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"{key} holds {twice!r} twice; drop one")
    for key, least in (("budget_steps", 1), ("eta", 2), ("min_steps", 1)):
        value = getattr(settings, key)
        if not _is_int(value) or value < least:
            raise UserError(f"{key} is {value!r}; it must be a whole number of at least {least}")
    for value in settings.sparsities:
        if not is_number(value) or not 0 <= value < 1:
            raise UserError(f"sparsity is {value!r}; the fraction removed must be in [0, 1)")
    for value in settings.learning_rates or []:
        if not is_number(value) or not value > 0:
            raise UserError(f"learning rate is {value!r}; it must be above 0")
    if not is_number(settings.choose_size) or settings.choose_size <= 0:
        raise UserError(f"choose_size is {settings.choose_size!r}; give a number of rows, or a fraction below 1")
    if (settings.group_sizes is None) == (settings.layer_groups is None):
        raise UserError("search needs group_sizes or layer_groups, and not both")
    return settings


def _checked(recipe: Recipe, settings: SearchSettings) -> Search:
    for key in _OF_TEST:
        if key in recipe.evaluation:
            raise UserError(f"evaluation sets {key}; a search measures loss on held-out training rows; drop it")
    for key in _DECIDED:
        if key in recipe.train:
            raise UserError(f"train sets {key}, which the search decides; drop it")
    if recipe.train.get("mask_selection", "topk") != "topk":
        raise UserError("mask_selection must be topk: with a threshold no sparsity is given that could be searched")
    if len(recipe.data) > 1:
        raise UserError(f"it has {len(recipe.data)} data sets; a search is on one, which may be a mixture")
    name = next(iter(recipe.data.values())).options["dataset_name"]
    for part in parse_mixture(name):
        if part.name.lower().endswith(FILE_ENDINGS) and not is_there(part.name):
            raise UserError(f"data file {part.name!r} does not exist; name the folder it is in: --data_dir DIR")
    num_layers = recipe.facts.num_layers
    if num_layers is None:
        from ..models import load_config

        config = load_config(recipe.models[0], revision=recipe.revision)
        num_layers = config.get_text_config().num_hidden_layers
    groups = _groups(settings, num_layers)
    rates = settings.learning_rates or [None]
    candidates = list(itertools.starmap(Candidate, itertools.product(groups, settings.sparsities, rates)))
    names = [candidate.name for candidate in candidates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two candidates are named {twice!r}; values that close mean the same: drop one")
    if len(candidates) < 2:
        raise UserError("there is 1 candidate; give at least 2: more layer groups, sparsities or learning rates")
    search = Search(recipe, settings, candidates)
    if search.steps[0] < settings.min_steps:
        probes, rungs = len(candidates) * len(recipe.seeds), len(search.sizes)
        raise UserError(
            f"budget_steps {settings.budget_steps} is too small for one rung: the first of {rungs} has {probes} "
            f"probes of {search.steps[0]} steps, fewer than min_steps {settings.min_steps}; give at least "
            f"{settings.min_steps * probes * rungs}"
        )
    return search


def _groups(settings: SearchSettings, num_layers: int) -> list[tuple[int, ...]]:
    """The layer groups, checked against the model."""
    for size in settings.group_sizes or []:
        if not _is_int(size) or not 1 <= size <= num_layers:
            raise UserError(f"group size is {size!r}; the model has {num_layers} layers, so give 1 to {num_layers}")
    groups = [
        tuple(range(min(first, num_layers - size), min(first, num_layers - size) + size))
        for size in settings.group_sizes or []
        for first in range(0, num_layers, size)
    ]
    for layers in settings.layer_groups or []:
        if not isinstance(layers, list) or not layers or len(set(map(str, layers))) < len(layers):
            raise UserError(f"layer group {layers!r} must be a list of different layers, e.g. [4, 5, 6, 7]")
        beyond = next((n for n in layers if not _is_int(n) or not 0 <= n < num_layers), None)
        if beyond is not None:
            raise UserError(f"layer group {layers} names layer {beyond!r}; the model has layers 0 to {num_layers - 1}")
        groups.append(tuple(sorted(layers)))
    return list(dict.fromkeys(groups))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
