"""The recipe of a study: one YAML file, checked before anything runs."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.arguments import DATA_NAMES, TEMPLATE, mixture_text, names_text
from ..data.mixtures import rename_sets
from ..data.sources import FILE_ENDINGS
from ..errors import UserError, did_you_mean
from ..files import is_there
from ..training.method_arguments import FIXED_MASK_METHODS, METHODS

VERSION = 1
PRETRAINED = "pretrained"  # method of a run that trains nothing: the base model itself
CURRENT_RATE = "current"  # learning_rate: that of the schedule of `from` at its best step
REVISION = "model_revision"  # the option that names a revision of a hub model


@dataclass(frozen=True)
class Facts:
    """What a dry run cannot look up without a download; used for its estimates and for nothing else.

    Attributes:
        num_layers: Decoder layers.
        num_parameters: Parameters of the model.
        weights_per_layer: Weights of the linear layers of one decoder layer.
        tokens_per_s: Training tokens per second of full fine-tuning, measured on the hardware meant.
        flops_per_s: FLOPs per second of all processes together, for where ``tokens_per_s`` is not measured.
        dtype_bytes: Bytes per parameter in the model's files, for ``dtype: auto``.
    """

    num_layers: int | None = None
    num_parameters: int | None = None
    weights_per_layer: int | None = None
    tokens_per_s: float | None = None
    flops_per_s: float | None = None
    dtype_bytes: int = 4


@dataclass(frozen=True)
class Data:
    """One training set, with the part of it that is held out.

    Attributes:
        options: Options of ``maskft train`` about data.
        num_rows: Rows to train on, for a dry run's estimate where the data is not at hand.
        tokens_per_row: Mean tokens of a row, for the same estimate.
    """

    options: dict[str, Any]
    num_rows: int | None = None
    tokens_per_row: float | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table: what is trained, from which model, with which options.

    Attributes:
        name: Label in tables.
        method: ``pretrained`` or a method of ``maskft train``.
        start: Name of the method whose best checkpoint this starts from; None: the base model.
        match: Name of the mask whose counts a fixed mask takes.
        data: Name of the data; None: the recipe's first.
        last: What the model at the end of training is called beside the best one; None: it is not kept.
        seeds: Seeds of this method; None: those of the study.
        options: Options of ``maskft train`` that are this method's own.
    """

    name: str
    method: str
    start: str | None = None
    match: str | None = None
    data: str | None = None
    last: str | None = None
    seeds: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """How a run is started.

    Attributes:
        accelerate_config: One of TRL's configurations (``fsdp2``, ``multi_gpu``) or a file of ``accelerate config``.
        command: Words before ``-m maskft.cli.main train``, e.g. ``torchrun --nproc_per_node 8``; None: this Python.
        num_processes: ``maskft train --num_processes N``; None: what the accelerate configuration says, else 1. Beside
            ``command`` it starts nothing, it tells a dry run how many processes the command starts.
        num_cpus: CPU cores a run takes on a Ray cluster.
        num_gpus: GPUs a run takes on a Ray cluster.
    """

    accelerate_config: str | None = None
    command: str | None = None
    num_processes: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0


@dataclass(frozen=True)
class Recipe:
    """A study."""

    name: str
    models: tuple[str, ...]
    data: dict[str, Data]
    methods: dict[str, Method]
    train: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    grid: dict[tuple[str, str], list] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    facts: Facts = field(default_factory=Facts)
    launch: Launch = field(default_factory=Launch)

    @property
    def revision(self) -> str:
        """Of the base models, where they are on the hub."""
        return self.train.get(REVISION, "main")


_KEYS = (
    "version",
    "name",
    "model",
    "models",
    "model_facts",
    "data",
    "train",
    "seeds",
    "methods",
    "grid",
    "evaluation",
    "baseline",
    "launch",
)
# Key of a method's section -> field of Method; every other key is an option of `maskft train`.
_METHOD_KEYS = {
    "method": "method",
    "from": "start",
    "match": "match",
    "data": "data",
    "last": "last",
    "seeds": "seeds",
}


class _Loader(yaml.SafeLoader):
    """YAML as it is, but a key given twice is an error and 1e-3 is a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`; what it brings may be replaced
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                raise UserError(f"line {key_node.start_mark.line + 1}: {key!r} stands where a name should be")
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: two entries are named {key!r}; rename one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(loader, node):
    text = loader.construct_scalar(node)
    try:  # YAML 1.1 takes 1e-3 for text
        return float(text) if node.style is None and text[:1].isdigit() else text
    except ValueError:
        return text


_Loader.add_constructor("tag:yaml.org,2002:str", _number)
# A date is the text that it was written as.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def load_recipe(file: str | Path, data_dir: str | Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        file: The YAML file.
        data_dir: Folder in which data files that the recipe names without a folder are looked for.

    Raises:
        UserError: The first mistake, in one line.
    """
    file, content = Path(file), read_content(file)
    try:
        return parse_recipe(content, file.stem, data_dir, file.parent)
    except UserError as error:
        raise UserError(f"recipe {str(file)!r}: {error}") from None


def read_content(file: str | Path) -> Any:
    """What the YAML of a recipe holds, unchecked; every mistake of form is one UserError."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"recipe {str(file)!r} does not exist")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except UserError as error:
        raise UserError(f"recipe {str(file)!r}, {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(file)!r} is not YAML: {' '.join(str(error).split())}") from None


def parse_recipe(
    content: Any, name: str = "study", data_dir: str | Path | None = None, folder: str | Path = "."
) -> Recipe:
    """Build a :class:`Recipe` from what the YAML holds; see :func:`load_recipe`.

    Args:
        content: The YAML's value.
        name: Name of the study where the recipe gives none.
        data_dir: Folder in which data files are looked for.
        folder: Folder from which a relative ``chat_template_path`` counts.
    """
    if not isinstance(content, dict):
        raise UserError("it must be a list of `name: value` lines")
    version = content.get("version")
    if version is None:
        raise UserError(f"it has no version; write `version: {VERSION}`")
    if not is_number(version) or version < 1:
        raise UserError(f"its version is {version!r}; write `version: {VERSION}`")
    if version > VERSION:
        raise UserError(
            f"it is of version {version}, this maskft reads up to {VERSION}; upgrade: pip install -U maskft"
        )
    _check_keys(content, _KEYS, "key")
    for key in ("data", "methods"):
        if not isinstance(content.get(key), dict) or not content[key]:
            raise UserError(f"it has no section {key!r}")
    models = _models(content)
    data = {key: _data(key, section, data_dir) for key, section in content["data"].items()}
    methods = {str(key): _method(str(key), section, data) for key, section in content["methods"].items()}
    seeds = _seeds(content.get("seeds", [0]), "seeds")
    for method in methods.values():
        if method.seeds and len(seeds) > 1 and method.seeds != seeds:
            raise UserError(
                f"method {method.name!r} has seeds {list(method.seeds)} and the study {list(seeds)}; they are paired "
                "by seed; give a method its own seeds only where the study has one"
            )
    labels = [label for method in methods.values() for label in labels_of(method)]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"two runs are named {twice!r}; rename a method or its `last`")
    baseline = content.get("baseline")
    if baseline is not None and baseline not in labels:
        raise UserError(f"baseline {baseline!r} is no run{did_you_mean(str(baseline), labels)}: {', '.join(labels)}")
    train = _as_text(_section(content, "train"))
    if TEMPLATE in train:
        # Of the pre-trained model too: all rows of the table answer to the same prompts.
        train[TEMPLATE] = str(Path(folder) / Path(str(train[TEMPLATE])).expanduser())
        if not Path(train[TEMPLATE]).is_file():
            raise UserError(f"{TEMPLATE} names {train[TEMPLATE]!r}, which is no file; its place counts from the recipe")
    name = str(content.get("name", name))
    if name in ("", ".", "..") or "/" in name:
        raise UserError(f"its name is {name!r}; it names a folder, so give a word without a slash")
    recipe = Recipe(
        name=name,
        models=models,
        data=data,
        methods=methods,
        train=train,
        seeds=seeds,
        grid=_grid(_section(content, "grid"), methods),
        evaluation={key: train[key] for key in (TEMPLATE, REVISION) if key in train}
        | _evaluation(_section(content, "evaluation"), data_dir),
        baseline=baseline,
        facts=_build(Facts, _section(content, "model_facts"), "model_facts"),
        launch=_build(Launch, _section(content, "launch"), "launch"),
    )
    _check_parents(methods)
    return recipe


def is_number(value: Any) -> bool:
    """Whether a value of a recipe is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _models(content: dict) -> tuple[str, ...]:
    if "model" in content and "models" in content:
        raise UserError("it has `model` and `models`; drop one")
    models = content.get("models", content.get("model"))
    models = models if isinstance(models, list) else [models]
    if not models or not all(isinstance(model, str) and model for model in models):
        raise UserError("it names no model; write `model: NAME`, or `models: [NAME, NAME]`")
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise UserError(f"models holds {twice!r} twice; drop one")
    return tuple(models)


def labels_of(method: Method) -> list[str]:
    """Names under which a method's models stand in tables: the best, and where it is kept the last."""
    return [f"{method.name} (best)", f"{method.name} ({method.last})"] if method.last else [method.name]


def _check_keys(section: dict, known, what: str) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"unknown {what} {key!r}{did_you_mean(str(key), known)}")


def _section(content: dict, key: str) -> dict:
    section = content.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"{key} must be a list of `name: value` lines, not {section!r}")
    return dict(section)


def _build(kind, section: dict, where: str):
    _check_keys(section, kind.__dataclass_fields__, f"key in {where}:")
    for key, value in section.items():
        types = str(kind.__dataclass_fields__[key].type)
        if "str" in types:
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where}: {key} is {value!r}; it must be text")
            try:
                shlex.split(value)
            except ValueError as error:
                raise UserError(f"{where}: {key} is {value!r}; {error}") from None
        elif not is_number(value) or (not value > 0 and key != "num_gpus") or value < 0:
            raise UserError(f"{where}: {key} is {value!r}; it must be a number above 0")
        elif "int" in types and value != int(value):
            raise UserError(f"{where}: {key} is {value!r}; it must be a whole number")
    return kind(**section)


def _data(name: str, section: Any, data_dir) -> Data:
    if not isinstance(section, dict):
        raise UserError(f"data {name!r} must be a list of `name: value` lines")
    section = dict(section)
    estimate = {key: section.pop(key, None) for key in ("num_rows", "tokens_per_row")}
    for key, value in estimate.items():
        if value is not None and (not is_number(value) or value <= 0):
            raise UserError(f"data {name!r}: {key} is {value!r}; it must be a number above 0")
    if not section.get("dataset_name"):
        raise UserError(f"data {name!r} has no dataset_name")
    options = _as_text(section)
    if not isinstance(options["dataset_name"], str):
        raise UserError(f"data {name!r}: dataset_name is {options['dataset_name']!r}; it must be a name, or name: rows")
    options = in_data_dir(options, data_dir)
    if data_dir is not None:
        options["data_dir"] = str(data_dir)  # sets by name are looked for there, test sets too
    return Data(options, **estimate)


def _as_text(options: dict) -> dict:
    """Mixtures and lists of test sets as the command line takes them."""
    forms = {"dataset_name": mixture_text, "contamination_sets": names_text}
    return {key: forms[key](value) if key in forms else value for key, value in options.items()}


def in_data_dir(options: dict, data_dir: str | Path | None) -> dict:
    """Replace file names that mean nothing here by the files of that name in ``data_dir``."""
    options = dict(options)
    for key in DATA_NAMES:
        name = options.get(key)
        if data_dir is not None and isinstance(name, str):
            options[key] = rename_sets(name, lambda name: _in_data_dir(name, Path(data_dir).expanduser()))
    return options


def _in_data_dir(name: str, folder: Path) -> str:
    if not name.lower().endswith(FILE_ENDINGS) or is_there(name):
        return name
    if not (folder / name).is_file():
        raise UserError(f"data file {name!r} is neither here nor in data_dir {str(folder)!r}")
    return str(folder / name)


def _method(name: str, section: Any, data: dict) -> Method:
    if not isinstance(section, dict):
        raise UserError(f"method {name!r} must be a list of `name: value` lines")
    if "." in name:
        raise UserError(f"method name {name!r} has a dot, which separates names from options in the grid; rename it")
    fields = {field: section[key] for key, field in _METHOD_KEYS.items() if key in section}
    options = _as_text({key: value for key, value in section.items() if key not in _METHOD_KEYS})
    if "keep_last" in options:
        raise UserError(f"method {name!r} has keep_last; write `last: NAME`, the name of that model in tables")
    kinds = (PRETRAINED, *METHODS)
    kind = fields.get("method")
    if kind not in kinds:
        raise UserError(
            f"method {name!r} is of method {kind!r}{did_you_mean(str(kind), kinds)}; one of: {', '.join(kinds)}"
        )
    for key in ("from", "match", "data", "last"):
        if section.get(key) is not None and not isinstance(section[key], str):
            raise UserError(f"method {name!r} has {key}: {section[key]!r}; it must be one name")
    if kind == PRETRAINED and (options or len(fields) > 1):
        raise UserError(f"method {name!r} is {PRETRAINED}: it takes no option")
    if fields.get("data") is not None and fields["data"] not in data:
        raise UserError(f"method {name!r} names data {fields['data']!r}{did_you_mean(fields['data'], data)}")
    if fields.get("seeds") is not None:
        fields["seeds"] = _seeds(fields["seeds"], f"seeds of method {name!r}")
    if fields.get("last"):
        if kind in FIXED_MASK_METHODS:
            raise UserError(f"method {name!r} has `last`, and {kind} has no end of training; drop it")
        options["keep_last"] = True
    return Method(name=name, options=options, **fields)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(seed, int) and seed >= 0 for seed in value):
        raise UserError(f"{where} must be a list of whole numbers, e.g. [0, 1], not {value!r}")
    if len(set(value)) < len(value):
        raise UserError(f"{where} {value} holds one seed twice: two runs would have one name")
    return tuple(value)


def _grid(section: dict, methods: dict) -> dict[tuple[str, str], list]:
    grid = {}
    for key, values in section.items():
        name, dot, option = str(key).rpartition(".")
        if not dot or name not in methods:
            raise UserError(f"grid key {key!r} must be METHOD.OPTION{did_you_mean(name, methods)}")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid {key!r} must be a list of values, not {values!r}")
        twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
        if twice is not None:
            raise UserError(f"grid {key!r} holds {twice!r} twice: two runs would have one name; drop one")
        grid[name, option] = values
    return grid


def _evaluation(section: dict, data_dir) -> dict:
    """Options of ``maskft evaluate``: ``heldout`` holds those about data, and is measured beside the ``tasks``."""
    heldout = section.pop("heldout", None)
    if heldout is not None and not isinstance(heldout, dict):
        raise UserError(f"evaluation.heldout must be a list of `name: value` lines, not {heldout!r}")
    tasks = section.get("tasks")
    if isinstance(tasks, str):
        tasks = [name.strip() for name in tasks.split(",")]
    if tasks is not None and not isinstance(tasks, list):
        raise UserError(f"evaluation.tasks must be a list of names, not {tasks!r}")
    if tasks:
        section["tasks"] = (["heldout"] if heldout and "heldout" not in tasks else []) + list(tasks)
    if data_dir is not None and (tasks or heldout):
        section["data_dir"] = str(data_dir)
    return section | in_data_dir(heldout or {}, data_dir)


def _check_parents(methods: dict[str, Method]) -> None:
    for method in methods.values():
        for key, name in (("from", method.start), ("match", method.match)):
            if name is not None and name not in methods:
                raise UserError(
                    f"method {method.name!r} has {key}: {name!r}, which is missing{did_you_mean(name, methods)}"
                )
    for name in methods:
        cycle = _leads_back(name, methods)
        if cycle:
            raise UserError(f"the runs form a cycle: {' -> '.join(cycle)}; break it")
    for method in methods.values():
        if method.match is not None and methods[method.match].method != "mask":
            raise UserError(f"method {method.name!r} matches {method.match!r}, which is no learned mask")
        start = methods.get(method.start)
        if start is not None and start.method not in (PRETRAINED, "full"):
            raise UserError(
                f"method {method.name!r} starts from {start.name!r}, an adapter of method {start.method}; start from "
                "full fine-tuning"
            )


def _leads_back(name: str, methods: dict[str, Method]) -> list[str] | None:
    paths = [[name]]
    while paths:
        path = paths.pop()
        for parent in filter(None, (methods[path[-1]].start, methods[path[-1]].match)):
            if parent == name:
                return [*path, parent]
            if parent not in path:
                paths.append([*path, parent])
    return None
