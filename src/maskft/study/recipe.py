"""The recipe of a study: one YAML file, read into types and checked before anything runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from ..data.arguments import DATA_NAMES, TEMPLATE, mixture_text, names_text
from ..data.mixtures import rename_sets
from ..data.sources import FILE_ENDINGS
from ..errors import UserError, did_you_mean
from ..files import FileModel, is_there, read_model, read_yaml
from ..training.method_arguments import FIXED_MASK_METHODS, METHODS

VERSION = 1
PRETRAINED = "pretrained"  # method of a run that trains nothing: the base model itself
CURRENT_RATE = "current"  # learning_rate: that of the schedule of `from` at its best step
REVISION = "model_revision"  # the option that names a revision of a hub model

Count = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]


class Section(FileModel):
    """A section of a recipe; values are taken as YAML reads them, so ``"8"`` is no number."""

    model_config = ConfigDict(strict=True)


class SectionWithOptions(Section):
    """A section in which every key that is no field is an option of ``maskft train``."""

    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        keys = {field.alias or name for name, field in cls.model_fields.items()} - {"options", "name"}
        options = {str(key): value for key, value in section.items() if key not in keys}
        return {key: value for key, value in section.items() if key in keys} | {"options": as_text(options)}


class Facts(Section):
    """What a dry run cannot look up without a download; used for its estimates and for nothing else.

    Attributes:
        num_layers: Decoder layers.
        num_parameters: Parameters of the model.
        weights_per_layer: Weights of the linear layers of one decoder layer.
        tokens_per_s: Training tokens per second of full fine-tuning, measured on the hardware meant.
        flops_per_s: FLOPs per second of all processes together, for where ``tokens_per_s`` is not measured.
        dtype_bytes: Bytes per parameter in the model's files, for ``dtype: auto``.
    """

    num_layers: Count | None = None
    num_parameters: Count | None = None
    weights_per_layer: Count | None = None
    tokens_per_s: Number | None = None
    flops_per_s: Number | None = None
    dtype_bytes: Count = 4


class Data(SectionWithOptions):
    """One training set, with the part of it that is held out.

    Attributes:
        options: Options of ``maskft train`` about data.
        num_rows: Rows to train on, for a dry run's estimate where the data is not at hand.
        tokens_per_row: Mean tokens of a row, for the same estimate.
    """

    num_rows: Count | None = None
    tokens_per_row: Number | None = None

    @model_validator(mode="after")
    def _has_a_name(self) -> Data:
        name = self.options.get("dataset_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"dataset_name is {name!r}; it must be a name, or `name: rows`")
        return self


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Method(SectionWithOptions):
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

    name: str = ""
    method: Literal[(PRETRAINED, *METHODS)]
    start: str | None = Field(default=None, alias="from")
    match: str | None = None
    data: str | None = None
    last: str | None = None
    seeds: Seeds | None = None

    @model_validator(mode="after")
    def _fits_its_method(self) -> Method:
        others = sorted(self.model_fields_set - {"name", "method", "options"}) + list(self.options)
        if self.method == PRETRAINED and others:
            raise ValueError(f"method {PRETRAINED} trains nothing; drop {', '.join(others)}")
        if self.last and self.method in FIXED_MASK_METHODS:
            raise ValueError(f"last is {self.last!r}, and {self.method} has no end of training; drop it")
        if self.match and self.method not in FIXED_MASK_METHODS:
            raise ValueError(f"match is {self.match!r}, which is for {', '.join(FIXED_MASK_METHODS)}; drop it")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the method's models in tables: the best, and where it is kept the last."""
        return [f"{self.name} (best)", f"{self.name} ({self.last})"] if self.last else [self.name]

    @property
    def parents(self) -> list[str]:
        """Names of the methods that this one is made from."""
        return [name for name in (self.start, self.match) if name is not None]


def _named(methods: dict[str, Method]) -> dict[str, Method]:
    return {name: method.model_copy(update={"name": name}) for name, method in methods.items()}


Methods = Annotated[dict[str, Method], Field(min_length=1), AfterValidator(_named)]


def methods_of(sections: dict[str, dict[str, Any]]) -> dict[str, Method]:
    """Methods from what stands in a recipe's section ``methods``."""
    return TypeAdapter(Methods).validate_python(sections)


def _command(text: str) -> str:
    shlex.split(text)  # an open quotation is a ValueError
    return text


class Launch(Section):
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
    command: Annotated[str, Field(min_length=1), AfterValidator(_command)] | None = None
    num_processes: Count | None = None
    num_cpus: Number = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0


class Recipe(Section):
    """A study.

    Attributes:
        version: Of the format.
        name: Names the folder and the tables.
        models: Base models.
        data: Name -> training set; the first is the default.
        methods: Name -> method.
        train: Options of ``maskft train`` for all methods.
        seeds: Training seeds.
        grid: ``METHOD.OPTION`` -> values; see :attr:`axes`.
        evaluation: Options of ``maskft evaluate``; in the file those of held-out data stand under ``heldout``.
        baseline: Name in the tables of the run that all are compared with.
        facts: Of the base model, for estimates.
        launch: How runs are started.
    """

    version: int
    name: str
    models: list[str]
    data: Annotated[dict[str, Data], Field(min_length=1)]
    methods: Methods
    train: Annotated[dict[str, Any], AfterValidator(lambda options: as_text(options))] = {}
    seeds: Seeds = [0]
    grid: dict[str, Annotated[list, Field(min_length=1)]] = {}
    evaluation: dict[str, Any] = {}
    baseline: str | None = None
    facts: Facts = Field(default=Facts(), alias="model_facts")
    launch: Launch = Launch()

    @property
    def revision(self) -> str:
        """Of the base models, where they are on the hub."""
        return self.train.get(REVISION, "main")

    @property
    def axes(self) -> dict[tuple[str, str], list]:
        """The grid: name of a method and option -> values."""
        splits = {key: key.rpartition(".") for key in self.grid}
        return {(name, option): self.grid[key] for key, (name, _, option) in splits.items()}

    @model_validator(mode="before")
    @classmethod
    def _one_model_is_a_list_of_one(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if ("model" in content) == ("models" in content):
            raise ValueError("it must name the model; write `model: NAME`, or `models: [NAME, NAME]`")
        content = {"models": [content["model"]], **content} if "model" in content else content
        return {key: value for key, value in content.items() if key != "model"}

    @field_validator("version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(f"version is {version}; this maskft reads {VERSION} (a newer one: pip install -U maskft)")
        return version

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"name is {name!r}; it names a folder, so give a word without a slash")
        return name

    @field_validator("evaluation")
    @classmethod
    def _heldout_is_a_task(cls, section: dict[str, Any]) -> dict[str, Any]:
        """``heldout`` holds the options about data, and is measured beside the ``tasks``."""
        heldout, tasks = section.get("heldout"), section.get("tasks")
        if heldout is not None and not isinstance(heldout, dict):
            raise ValueError(f"heldout is {heldout!r}; it must be lines of `name: value`")
        if isinstance(tasks, str):
            tasks = [name.strip() for name in tasks.split(",")]
        if tasks is not None and not isinstance(tasks, list):
            raise ValueError(f"tasks is {tasks!r}; it must be a list of names")
        options = {key: value for key, value in section.items() if key not in ("heldout", "tasks")}
        if tasks:
            options["tasks"] = (["heldout"] if heldout and "heldout" not in tasks else []) + tasks
        return options | (heldout or {})

    @model_validator(mode="after")
    def _has_no_name_twice(self) -> Recipe:
        lists = {"models": self.models, "seeds": self.seeds, **{f"grid {k!r}": v for k, v in self.grid.items()}}
        lists |= {f"seeds of method {name!r}": method.seeds or [] for name, method in self.methods.items()}
        lists["methods and their `last`"] = labels = [label for m in self.methods.values() for label in m.labels]
        for where, values in lists.items():
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                raise ValueError(f"{where}: {twice!r} stands there twice, and two runs would have one name; drop one")
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(
                f"baseline is {self.baseline!r}{did_you_mean(self.baseline, labels)}; one of {', '.join(labels)}"
            )
        return self

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Recipe:
        for key in self.grid:
            name, dot, _ = key.rpartition(".")
            if not dot or name not in self.methods:
                raise ValueError(f"grid: {key!r} must be METHOD.OPTION{did_you_mean(name, self.methods)}")
        for name, method in self.methods.items():
            places = (("from", method.start, self.methods), ("match", method.match, self.methods))
            for key, value, known in (*places, ("data", method.data, self.data)):
                if value is not None and value not in known:
                    raise ValueError(
                        f"method {name!r} has {key}: {value!r}, which is missing{did_you_mean(value, known)}"
                    )
            if method.seeds and len(self.seeds) > 1 and method.seeds != self.seeds:
                raise ValueError(
                    f"method {name!r} has seeds {method.seeds} and the study {self.seeds}; they are paired by seed; "
                    "give a method its own seeds only where the study has one"
                )
        for name, method in self.methods.items():
            _check_no_cycle(self.methods, [name])
            if method.match is not None and self.methods[method.match].method != "mask":
                raise ValueError(f"method {name!r} matches {method.match!r}, which is no learned mask")
            start = method.start and self.methods[method.start]
            if start and start.method not in (PRETRAINED, "full"):
                raise ValueError(
                    f"method {name!r} starts from {start.name!r}, an adapter of method {start.method}; start from full "
                    "fine-tuning"
                )
        return self


def _check_no_cycle(methods: dict[str, Method], path: list[str]) -> None:
    for parent in methods[path[-1]].parents:
        if parent in path:
            raise ValueError(f"the runs form a cycle: {' -> '.join([*path, parent])}; break it")
        _check_no_cycle(methods, [*path, parent])


# Reading


def load_recipe(file: str | Path, data_dir: str | Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        file: The YAML file.
        data_dir: Folder in which data files that the recipe names without a folder are looked for.

    Raises:
        UserError: The first mistake, in one line.
    """
    return parse_recipe(read_yaml(file), data_dir, file)


def parse_recipe(content: Any, data_dir: str | Path | None = None, source: str | Path = "study") -> Recipe:
    """Build a :class:`Recipe` from what the YAML holds; see :func:`load_recipe`.

    Args:
        content: The YAML's value.
        data_dir: Folder in which data files are looked for.
        source: The file. Names the study where the recipe does not; a relative ``chat_template_path`` counts from it.
    """
    source = Path(source)
    if isinstance(content, dict):
        content = {"name": source.stem, **content}
    recipe = read_model(Recipe, content, source)
    train, evaluation = dict(recipe.train), dict(recipe.evaluation)
    if TEMPLATE in train:
        train[TEMPLATE] = str(source.parent / Path(str(train[TEMPLATE])).expanduser())
        if not Path(train[TEMPLATE]).is_file():
            raise UserError(
                f"{source}: {TEMPLATE} is {train[TEMPLATE]!r}, which is no file; its place counts from the recipe"
            )
    data = recipe.data
    if data_dir is not None:
        place = {"data_dir": str(data_dir)}  # sets by name are looked for there, test sets too
        data = {
            name: part.model_copy(update={"options": in_data_dir(part.options, data_dir) | place})
            for name, part in data.items()
        }
        if "tasks" in evaluation or "dataset_name" in evaluation:
            evaluation = in_data_dir(evaluation, data_dir) | place
    # Of the pre-trained model too: all rows of the table answer to the same prompts.
    shared = {key: train[key] for key in (TEMPLATE, REVISION) if key in train}
    return recipe.model_copy(update={"train": train, "data": data, "evaluation": shared | evaluation})


def as_text(options: dict[str, Any]) -> dict[str, Any]:
    """Mixtures and lists of test sets as the command line takes them."""
    forms = {"dataset_name": mixture_text, "contamination_sets": names_text}
    return {key: forms[key](value) if key in forms else value for key, value in options.items()}


def in_data_dir(options: dict[str, Any], data_dir: str | Path) -> dict[str, Any]:
    """Replace file names that mean nothing here by the files of that name in ``data_dir``."""
    folder = Path(data_dir).expanduser()
    names = {key: options[key] for key in DATA_NAMES if isinstance(options.get(key), str)}
    return options | {key: rename_sets(name, lambda name: _in_folder(name, folder)) for key, name in names.items()}


def _in_folder(name: str, folder: Path) -> str:
    if not name.lower().endswith(FILE_ENDINGS) or is_there(name):
        return name
    if not (folder / name).is_file():
        raise UserError(f"data file {name!r} is neither here nor in data_dir {str(folder)!r}")
    return str(folder / name)
