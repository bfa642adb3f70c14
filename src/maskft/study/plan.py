"""From a recipe to runs: which there are, what each depends on, and the name by which its result is found again.

A run is named by a hash of what decides its outcome: method, seed, every option that is not the default, digests of the
data files and of a local base model, and the hashes of the runs it is made from. So a change anywhere upstream gives
every run below a new name, and what did not change is found finished.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments, names_text
from ..data.prepared import data_identity
from ..errors import UserError, did_you_mean
from ..files import digest, digest_file
from ..models import model_identity
from ..training.method_arguments import FIXED_MASK_METHODS, MASK_METHODS
from .recipe import CURRENT_RATE, PRETRAINED, REVISION, Method, Recipe, is_number, labels_of

MAX_RUNS = 1000
BEST, LAST = "best", "last"
_HASH_LENGTH = 10
# What says which matrices are masked: a fixed mask takes it from the learned mask that it matches.
_PLACES = ("mask_layers_to_transform", "mask_layers_pattern", "mask_target_modules", "mask_exclude_modules")
_LAYERS = ("mask_layers_to_transform", "partial_layers")
_ROWS = "max_train_samples"
# What estimates and seeds compute with.
_NUMBERS = (
    "num_candidates",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "eval_split_size",
    _ROWS,
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True, eq=False)
class Run:
    """One run: one training (or one base model taken as it is), and the evaluations of its models.

    Attributes:
        method: The recipe's method.
        model: Base model of the study this run belongs to.
        seed: Training seed; also that of the mask unless ``mask_seed`` is given.
        axes: The grid's values that this run or one it is made from has.
        options: Options of ``maskft train``, without paths and model.
        parents: Runs it is made from: ``start`` and ``match``, None where there is none.
        id: Folder name; ends with the hash.
    """

    method: Method
    model: str
    seed: int
    axes: dict[tuple[str, str], Any]
    options: dict[str, Any]
    start: Run | None
    match: Run | None
    id: str

    @property
    def hash(self) -> str:
        """The part of the id that settings decide."""
        return self.id.rpartition("-")[2]

    @property
    def parents(self) -> list[Run]:
        """The runs that must be finished before this one starts."""
        return [run for run in (self.start, self.match) if run is not None]

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
            text = _short(value) if value is not None else "all" if option in (*_LAYERS, _ROWS) else "default"
            words.append(f"{whose}{option.removeprefix('mask_')}={text}")
        return f" [{', '.join(words)}]" if words else ""

    @property
    def labels(self) -> dict[str, str]:
        """Role (``best``, ``last``) -> name in tables."""
        return dict(zip((BEST, LAST), (label + self.variant for label in labels_of(self.method)), strict=False))

    @property
    def title(self) -> str:
        """Name of the run for people: method, grid values, seed."""
        return f"{self.method.name}{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, each after those it is made from."""

    recipe: Recipe
    runs: list[Run] = field(default_factory=list)


def build_plan(recipe: Recipe, defaults: dict[str, Any], allow_many: bool = False) -> Plan:
    """Expand a recipe into runs.

    Args:
        recipe: The recipe.
        defaults: Every option of ``maskft train`` with its default; see ``cli.train.option_defaults``.
        allow_many: Whether more than 1,000 runs are meant.

    Raises:
        UserError: If an option is unknown, or there are too many runs.
    """
    _check_options(recipe, defaults)
    count = sum(
        len(recipe.models) * _num_variants(recipe, method) * len(_seeds(recipe, method))
        for method in recipe.methods.values()
    )
    if count > MAX_RUNS and not allow_many:
        raise UserError(f"the grid makes {count:,} runs, more than {MAX_RUNS:,}; pass --yes if that is meant")
    found: dict[tuple, Run] = {}
    for model in recipe.models:
        for method in recipe.methods.values():
            for axes in _assignments(recipe, method):
                for seed in _seeds(recipe, method):
                    _build(recipe, defaults, found, model, method, axes, seed)
    runs = list(found.values())
    _check_names(runs)
    return Plan(recipe, runs)


def _check_names(runs: list[Run]) -> None:
    """Refuse two runs with one folder, or with one name in the tables."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        for key in (run.id, *((run.model, run.seed, label) for label in run.labels.values())):
            if key in seen:
                raise UserError(f"two runs are named {run.title!r}: their settings mean the same; drop one")
            seen[key] = run


def evaluation_id(run: Run, role: str, evaluation: dict, study: str) -> str:
    """Folder name of an evaluation of one of the run's models.

    It ends with a hash of what is measured and one of the study's name: studies in one folder copy each other's
    numbers, and each says itself what the model is in its tables.

    Args:
        run: The run.
        role: Which of its models.
        evaluation: See :func:`evaluation_identity`.
        study: Name of the study.
    """
    settings = {"run": run.hash, "role": role, "evaluation": evaluation}
    return f"{run.id.rpartition('-')[0]}-{role}-{_hash(settings)}-{_hash({'study': study})[:4]}"


def evaluation_identity(evaluation: dict) -> dict:
    """Options of ``maskft evaluate`` with data, and the files of benchmarks, by their content."""
    out, folder = _identity(evaluation), evaluation.get("data_dir")
    if folder is not None:
        digests = _benchmark_digests(names_text(evaluation.get("tasks")) or "", folder)
        out |= {f"files of {task}": digest for task, digest in digests.items()}
    return out


def data_hash(model: str, options: dict) -> str:
    """Name of what ``options`` about data, and the tokenizer of ``model``, make of the data."""
    defaults = {field.name: field.default for field in fields(DataArguments)}
    decides = {key: value for key, value in _identity(options).items() if value != defaults.get(key, options)}
    return _hash({"model": model_identity(model), "data": decides})


def _build(recipe, defaults, found, model, method, axes, seed) -> Run:
    """One run and, before it, those it is made from; ``found`` holds each once, in order."""
    axes = {key: value for key, value in axes.items() if key in _axes(recipe, method)}
    key = (model, method.name, json.dumps([[*k, v] for k, v in axes.items()]), seed)
    if key in found:
        return found[key]
    start, match = (
        None if name is None else _build(recipe, defaults, found, model, *_parent(recipe, name, seed, axes))
        for name in (method.start, method.match)
    )
    options = _options(recipe, method, axes, seed, match)
    named = _identity(_without_preset(options))
    settings = {
        "method": method.method,
        "model": model_identity(model),
        "options": {k: v for k, v in named.items() if k not in defaults or v != _plain(defaults[k])},
        "start": start and start.hash,
        "match": match and match.hash,
        **_launch_identity(recipe, method, options),
    }
    name = f"{_slug(method.name)}-s{seed}" if method.method != PRETRAINED else _slug(method.name)
    found[key] = Run(method, model, seed, axes, options, start, match, f"{name}-{_hash(settings)}")
    return found[key]


def _parent(recipe: Recipe, name: str, seed: int, axes: dict):
    """Method, axes and seed of the parent: the one with the same seed, else its only one."""
    method = recipe.methods[name]
    seeds = _seeds(recipe, method)
    if seed not in seeds and len(seeds) > 1:
        raise UserError(
            f"method {name!r} has seeds {list(seeds)}; a run made from it has seed {seed}, which has no match"
        )
    return method, axes, seed if seed in seeds else seeds[0]


def _seeds(recipe: Recipe, method: Method) -> tuple[int, ...]:
    """Seeds of a method; a base model taken as it is has but one."""
    return (recipe.seeds[0],) if method.method == PRETRAINED else method.seeds or recipe.seeds


def _launch_identity(recipe: Recipe, method: Method, options: dict) -> dict:
    """How many processes share a batch, where that decides its size: half as many make another run."""
    launch = recipe.launch
    if method.method in (PRETRAINED, *FIXED_MASK_METHODS) or options.get("global_batch_size"):
        return {}
    # Beside a command the number is there for estimates.
    num_processes = 1 if launch.command else launch.num_processes or 1
    shared = {"num_processes": num_processes, "command": launch.command}
    return {} if shared == {"num_processes": 1, "command": None} else {"launch": shared}


def _options(recipe: Recipe, method: Method, axes: dict, seed: int, match: Run | None) -> dict[str, Any]:
    """Options of ``maskft train``: the study's, the data's, the method's, the grid's; the later win."""
    if method.method == PRETRAINED:
        return {}
    data = recipe.data[method.data or next(iter(recipe.data))]
    shared = dict(recipe.train)
    if method.method not in MASK_METHODS:
        shared = {key: value for key, value in shared.items() if not key.startswith("mask_")}
    options = {**shared, **data.options, "seed": seed}
    if method.method in MASK_METHODS:
        options["mask_seed"] = seed
    own = method.options | {option: value for (name, option), value in axes.items() if name == method.name}
    options |= own
    if (options.get("num_candidates") or 1) > 1 and own.get("mask_seed") is None:
        # The candidates are mask_seed, mask_seed + 1, ...: without this those of two seeds would be nearly the same.
        options["mask_seed"] = seed * options["num_candidates"]
    options = {key: _plain(value) for key, value in options.items() if value is not None}
    options |= {key: _as_list(options[key]) for key in _LAYERS if key in options}
    if match is not None:
        for key in _PLACES:
            if key in method.options and options.get(key) != match.options.get(key):
                raise UserError(
                    f"method {method.name!r} has {key} {options.get(key)}, and the mask it matches, {match.title!r}, "
                    f"has {match.options.get(key)}; leave it out"
                )
        options = {key: value for key, value in options.items() if key not in _PLACES}
        options |= {key: match.options[key] for key in _PLACES if key in match.options}
    return options


def _axes(recipe: Recipe, method: Method) -> list[tuple[str, str]]:
    """Grid axes of a method: its own and those of what it is made from."""
    names = {method.name}
    for parent in filter(None, (method.start, method.match)):
        names |= {name for name, _ in _axes(recipe, recipe.methods[parent])}
    return [key for key in recipe.grid if key[0] in names]


def _assignments(recipe: Recipe, method: Method) -> Iterator[dict]:
    axes = _axes(recipe, method)
    for values in itertools.product(*(recipe.grid[axis] for axis in axes)):
        yield dict(zip(axes, values, strict=True))


def _num_variants(recipe: Recipe, method: Method) -> int:
    count = 1
    for axis in _axes(recipe, method):
        count *= len(recipe.grid[axis])
    return count


def _check_options(recipe: Recipe, defaults: dict) -> None:
    """Refuse a name that ``maskft train`` does not know, wherever it stands."""
    ours = {
        "method",
        "model_name_or_path",
        "output_dir",
        "resume_from_checkpoint",
        "match_adapter",
        "prepared_data_dir",
        "prepare_only",
    }
    known = set(defaults) - ours
    places = [("train", recipe.train)]
    places += [(f"data {name!r}", data.options) for name, data in recipe.data.items()]
    places += [(f"method {method.name!r}", method.options) for method in recipe.methods.values()]
    places += [(f"grid of {name!r}", {option: None}) for name, option in recipe.grid]
    for where, options in places:
        for option in options:
            if option in ours:
                raise UserError(f"{where} sets {option}, which the study itself decides; drop it")
            if option == REVISION and where != "train":
                raise UserError(f"{where} sets {option}; the base model is one for all runs, write it under train")
            if option == "keep_last" and not where.startswith("method"):
                raise UserError(f"{where} sets {option}; give the methods whose end is kept `last: NAME`")
            if option == "seed" or (option == "mask_seed" and where.startswith(("train", "data"))):
                raise UserError(f"{where} sets {option}, which the list of seeds decides; write `seeds: [0, 1]`")
            if option not in known:
                raise UserError(f"{where} has an unknown option {option!r}{did_you_mean(str(option), known)}")
    values = [options for _, options in places]
    values += [{option: value} for (_, option), values_ in recipe.grid.items() for value in values_]
    for options in values:
        _check_values(options, recipe.facts.num_layers)
    for method in recipe.methods.values():
        needs = method.method in FIXED_MASK_METHODS
        if method.match is not None and not needs:
            raise UserError(f"method {method.name!r} has `match`, which is for {', '.join(FIXED_MASK_METHODS)}")
        rates = [method.options.get("learning_rate"), *recipe.grid.get((method.name, "learning_rate"), ())]
        if CURRENT_RATE in rates and (method.start is None or recipe.methods[method.start].method != "full"):
            raise UserError(
                f"method {method.name!r} has learning_rate {CURRENT_RATE!r} but is not `from` a full fine-tuning whose "
                "rate that could be"
            )
    rates = [o.get("learning_rate") for o in (recipe.train, *(d.options for d in recipe.data.values()))]
    if CURRENT_RATE in rates:
        raise UserError(f"learning_rate: {CURRENT_RATE} is for a method with `from`, not for all")


def check_layers(plan: Plan, model: str, num_layers: int) -> None:
    """Refuse layers that a model does not have."""
    for run in plan.runs:
        if run.model == model:
            _check_values(run.options, num_layers)


def _check_values(options: dict, num_layers: int | None) -> None:
    """Refuse what the plan itself would stumble over; every other value is for the parser of ``maskft train``."""
    for option in _LAYERS:
        named = _as_list(options.get(option))
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in named):
            raise UserError(f"{option} is {options[option]!r}; it must be a list of layers, such as [20, 21]")
        beyond = [n for n in named if n < 0 or (num_layers is not None and n >= num_layers)]
        if beyond:
            known = "layers are counted from 0" if num_layers is None else f"the model has layers 0 to {num_layers - 1}"
            raise UserError(f"{option} names layer {beyond[0]}; {known}")
    for option in _NUMBERS:
        value = options.get(option)
        if value is not None and not is_number(value):
            raise UserError(f"{option} is {value!r}; it must be a number")


def _as_list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


# Identities


def _hash(settings: dict) -> str:
    return digest(json.dumps(settings, sort_keys=True, ensure_ascii=False))[:_HASH_LENGTH]


def _identity(options: dict) -> dict:
    """The options as a run's hash takes them: data by its content, and where a cache lies decides nothing."""
    out = data_identity({key: _plain(value) for key, value in options.items()})
    if out.get("mask_prefix_cache"):
        out["mask_prefix_cache"] = True
    if out.get("eval_data_dir"):
        # Training items only choose a checkpoint; what reports on it may be edited.
        tasks = names_text(out.get("eval_tasks")) or ""
        out["eval_data_dir"] = _benchmark_digests(tasks, out["eval_data_dir"], ["train"])
    return out


def _benchmark_digests(tasks: str, folder: str, splits: Sequence[str] | None = None) -> dict[str, str]:
    """Task -> hash of its files in a folder, for those that have some there; of some splits or all."""
    from ..evaluation.task_data import benchmark_files

    named = filter(None, (task.strip() for task in tasks.split(",")))
    files = {task: benchmark_files(task, Path(folder).expanduser(), splits) for task in named}
    return {task: _hash({"files": [*map(digest_file, found)]}) for task, found in files.items() if found}


def _without_preset(options: dict) -> dict:
    """The options with those that ``mask_preset`` stands for."""
    if options.get("mask_preset") is None:
        return options
    from ..tuner.config import PRESETS

    preset = PRESETS.get(options["mask_preset"], {})
    return {f"mask_{key}": value for key, value in preset.items()} | {
        key: value for key, value in options.items() if key != "mask_preset" or not preset
    }


def _plain(value: Any) -> Any:
    """One spelling for values that mean the same: 2.0 is 2, an enum is its value."""
    value = getattr(value, "value", value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "run"


def _short(value: Any) -> str:
    """A list of consecutive layers as first-last."""
    if isinstance(value, list) and len(value) > 1 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return str(value)
