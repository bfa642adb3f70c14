"""The recipe of a study: one YAML file, read into types and checked before anything runs."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from maskft.data.arguments import DATA_NAMES, TEMPLATE, mixture_text
from maskft.data.mixtures import rename_sets
from maskft.data.sources import FILE_ENDINGS
from maskft.training.method_arguments import (
    FIXED_MASK_METHODS,
    INTERPOLATE,
    MASK_METHODS,
    METHODS,
    PEFT,
    UNTRAINED_METHODS,
)
from maskft_base.errors import UserError, did_you_mean
from maskft_base.files import FileModel, Name, is_there, read_model, read_yaml

from .controls import LENGTHS, with_standard_controls
from .halving import rung_sizes

VERSION = 1
PRETRAINED = "pretrained"  # method of a run that trains nothing: the base model itself
CURRENT_RATE = "current"  # learning_rate: that of the schedule of `from` at its best step
REVISION = "model_revision"  # the option that names a revision of a hub model
# How held-out data is evaluated: of `evaluation`, and of each set of earlier abilities unless it says otherwise.
HOW = frozenset("model_revision chat_template_path dtype bf16 device batch_size max_memory_gb".split())
HOW_OF_HELDOUT = frozenset("max_length max_new_tokens no_generate dataset_text_field".split())

Count = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]
Options = dict[str, Any]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Section(FileModel):
    """A section of a recipe; values are taken as YAML reads them, so ``"8"`` is no number."""

    model_config = ConfigDict(strict=True)


class SectionWithOptions(Section):
    """A section in which every key that is no field is an option of ``maskft train``."""

    options: Options = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        keys = {field.alias or name for name, field in cls.model_fields.items()} - {"options", "name"}
        options = {str(key): value for key, value in section.items() if key not in keys}
        return {key: value for key, value in section.items() if key in keys} | {"options": as_text(options)}


class Facts(Section):
    """What a dry run cannot look up without a download; used for its estimates and for nothing else."""

    num_layers: Count | None = None  # decoder layers
    num_parameters: Count | None = None
    weights_per_layer: Count | None = None  # of the linear layers of one decoder layer
    tokens_per_s: Number | None = None  # of full fine-tuning, measured on the hardware meant
    flops_per_s: Number | None = None  # of all processes together, where tokens_per_s is not measured
    dtype_bytes: Count = 4  # per parameter in the model's files, for `dtype: auto`


class Data(SectionWithOptions):
    """One training set, with the part of it that is held out."""

    num_rows: Count | None = None  # to train on, for a dry run where the data is not at hand
    tokens_per_row: Number | None = None  # mean, for the same estimate

    @model_validator(mode="after")
    def _has_a_name(self) -> Data:
        name = self.options.get("dataset_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"dataset_name is {name!r}; it must be a name, or `name: rows`")
        return self


def _number(value: Any) -> Any:
    """A number where YAML reads a text, as of 3e-3, so that two spellings are not two settings."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class TimesParent(Section):
    """Values of an option as multiples of the value that the method's ``from`` has."""

    times_parent: Annotated[list[Number], Field(min_length=1)]


class Halving(Section):
    """Successive halving of a grid, in the words of scikit-learn's ``HalvingGridSearchCV``."""

    resource: Literal[LENGTHS]  # the option that says how long a run trains; the method's value is the last rung's
    factor: Annotated[int, Field(ge=2)] = 3  # of a rung's settings one in factor goes on, to factor times the length
    min_resources: Number | None = None  # no rung is shorter

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, section: Any) -> Any:
        section = {"resource": section} if isinstance(section, str) else section
        if not isinstance(section, dict):
            raise ValueError(f"it is {section!r}; write `halving: {LENGTHS[0]}`")
        return section


class Tuning(Section):
    """Section ``tune`` of a method: options of ``maskft train`` whose values the held-out rows choose."""

    grid: dict[str, Annotated[list, Field(min_length=1)] | TimesParent] = {}  # in the file: keys beside the others
    halving: Halving | None = None  # None: every setting is tried at the whole length
    double: str | None = None  # the option, such as num_train_epochs, that the winner is given twice as much of

    @model_validator(mode="before")
    @classmethod
    def _gather_grid(cls, section: Any) -> Any:
        if not isinstance(section, dict) or not set(section) - {"halving"}:
            raise ValueError("write `tune: {OPTION: [VALUE, VALUE]}`")
        given = {key: section[key] for key in ("halving", "double") if key in section}
        grid = {str(key): value for key, value in section.items() if key not in given}
        return {"grid": {k: [*map(_number, v)] if isinstance(v, list) else v for k, v in grid.items()}, **given}

    @model_validator(mode="after")
    def _can_be_halved(self) -> Tuning:
        length = next((option for option in LENGTHS if option in self.grid), None)
        if self.halving and length:
            raise ValueError(
                f"{length} has values to try, and halving chooses among runs of equal length; drop one of the two"
            )
        if self.halving and self.grid_size < 2:
            raise ValueError("halving has 1 setting to choose from; give more values, or drop it")
        return self

    @classmethod
    def nothing(cls) -> Tuning:
        """Of a method whose settings are given: one trial."""
        return cls.model_construct(grid={}, halving=None, double=None)

    @property
    def grid_size(self) -> int:
        """How many settings the grid has."""
        return math.prod(map(len, self.lists.values()))

    @property
    def num_trials(self) -> int:
        """Trainings of one seed, without those of ``double``."""
        return sum(rung_sizes(self.grid_size, self.halving.factor)) if self.halving else self.grid_size

    @property
    def options(self) -> list[str]:
        """Names of all options that it decides."""
        return [*self.grid, *([self.halving.resource] if self.halving else []), *([self.double] if self.double else [])]

    @property
    def lists(self) -> dict[str, list]:
        """Option -> what stands in its list, values or multiples of the parent's."""
        return {key: v.times_parent if isinstance(v, TimesParent) else v for key, v in self.grid.items()}


Share = Annotated[float, Field(gt=0, le=1)]


class Choice(Section):
    """What held-out rows choose among the points of a method's path: one of the two constraints."""

    accuracy_at_least: Share | None = None  # of the best that any method of the same data has; then least forgetting
    forgetting_at_most: Number | None = None  # nats per token; then most accuracy

    @model_validator(mode="after")
    def _is_one(self) -> Choice:
        if (self.accuracy_at_least is None) == (self.forgetting_at_most is None):
            raise ValueError("choose takes one of accuracy_at_least and forgetting_at_most")
        return self


class MethodPath(Section):
    """Section ``path``: where between the base model and the end of training every trained method is measured.

    On the rows held out from training data, and on rows of earlier abilities that the study does not report on.
    """

    before: dict[str, Options] = {}  # as evaluation.before, of other rows
    checkpoints: Annotated[list[Share], Field(min_length=1)] = [1.0]  # shares of training, at the whole change
    scales: list[Share] = []  # parts of the change at the end of training, W0 + scale * (W - W0)
    choose: Choice | None = None  # None: the setting with the lowest held-out loss, at its best checkpoint

    @property
    def points(self) -> list[tuple[float, float]]:
        """Share of training and part of the change of every point."""
        return list(dict.fromkeys([*((share, 1.0) for share in self.checkpoints), *((1.0, s) for s in self.scales)]))


class Method(SectionWithOptions):
    """One line of the table: what is trained, from which model, with which options."""

    name: str = ""  # in tables: its key in the recipe
    method: Literal[(PRETRAINED, *METHODS)]
    start: str | None = Field(default=None, alias="from")  # the method whose best checkpoint it starts from
    match: str | None = None  # the learned mask whose counts a fixed mask takes
    start_mask: str | None = None  # the mask after which all weights of `from` train
    keep_mask: str | None = None  # the mask whose removed weights of `from` stay zero while the others train
    tune: Tuning | None = None
    tuned_elsewhere: Count | None = None  # settings that an earlier study tried, whose choice stands in the options
    data: str | None = None  # None: the recipe's first
    last: str | None = None  # name of the model at the end of training beside the best one; None: not kept
    seeds: Seeds | None = None  # None: those of the study

    @model_validator(mode="after")
    def _fits_its_method(self) -> Method:
        others = sorted(self.model_fields_set - {"name", "method", "options"}) + list(self.options)
        if self.method == PRETRAINED and others:
            raise ValueError(f"method {PRETRAINED} trains nothing; drop {', '.join(others)}")
        if self.last and self.method in UNTRAINED_METHODS:
            raise ValueError(f"last is {self.last!r}, and {self.method} has no end of training; drop it")
        if self.match and self.method not in FIXED_MASK_METHODS:
            raise ValueError(f"match is {self.match!r}, which is for {', '.join(FIXED_MASK_METHODS)}; drop it")
        if self.method == INTERPOLATE and self.start is None:
            raise ValueError("interpolate mixes a method's model with what it was made from; name it in `from`")
        if self.masks and (len(self.masks) > 1 or self.method not in ("full", PEFT)):
            raise ValueError(f"{' and '.join(self.masks)}: one of them, and with method full or peft; drop it")
        if self.method == PEFT and (self.keep_mask or (self.masks and self.last)):
            raise ValueError("an adapter may begin after start_mask, and is merged at its end; drop keep_mask and last")
        if self.tune and self.method in UNTRAINED_METHODS:
            raise ValueError(f"tune is for methods that are trained, and {self.method} is not; drop it")
        twice = next((option for option in self.tune.grid if option in self.options), None) if self.tune else None
        if twice:
            raise ValueError(f"{twice} stands both in tune and beside it; drop one")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the method's models in tables: the best, and where it is kept the last."""
        return [f"{self.name} (best)", f"{self.name} ({self.last})"] if self.last else [self.name]

    @property
    def parents(self) -> list[str]:
        """Names of the methods that this one is made from."""
        return [name for name in (self.start, self.match, *self.masks.values()) if name is not None]

    @property
    def masks(self) -> dict[str, str]:
        """Option of ``maskft train`` -> name of the method whose mask full fine-tuning starts with or keeps."""
        named = {"start_mask": self.start_mask, "keep_mask": self.keep_mask}
        return {option: name for option, name in named.items() if name is not None}


def _named(methods: dict[str, Method]) -> dict[str, Method]:
    return {name: method.model_copy(update={"name": name}) for name, method in methods.items()}


Methods = Annotated[dict[Name, Method], Field(min_length=1), AfterValidator(_named)]


def methods_of(sections: dict[str, Options]) -> dict[str, Method]:
    """Methods from what stands in a recipe's section ``methods``."""
    return TypeAdapter(Methods).validate_python(sections)


class Launch(Section):
    """How a run is started."""

    accelerate_config: str | None = None  # fsdp2, multi_gpu, ... of TRL, or a file of `accelerate config`
    command: str | None = None  # before `-m maskft_lab.cli.main train`, e.g. torchrun --nproc_per_node 8
    num_processes: Count | None = None  # None: as accelerate_config says, else 1; beside `command` for estimates only
    num_cpus: Number = 1  # that a run takes on a Ray cluster
    num_gpus: Annotated[float, Field(ge=0)] = 0

    @field_validator("command")
    @classmethod
    def _can_be_split(cls, command: str | None) -> str | None:
        shlex.split(command or "")  # an open quotation is a ValueError
        return command


class Recipe(Section):
    """A study."""

    version: int
    name: Name  # of the folder and of the tables
    models: list[str]  # in the file also `model`, of one
    data: Annotated[dict[str, Data], Field(min_length=1)]
    methods: Methods
    controls: Literal["standard"] | list[str] | None = None  # see controls.py; a list: of these masks
    train: Annotated[Options, AfterValidator(lambda options: as_text(options))] = {}  # for all methods
    seeds: Seeds = [0]
    tune_seeds: Seeds | None = None  # whose held-out losses choose what is under `tune`; None: the first of `seeds`
    grid: dict[str, Annotated[list, Field(min_length=1)]] = {}  # METHOD.OPTION -> values
    evaluation: Options = {}  # of `maskft evaluate`; in the file those of held-out data stand under `heldout`
    before: dict[str, Options] = Field(default={}, alias="evaluation.before")  # held-out data of earlier abilities
    path: MethodPath | None = None
    baseline: str | None = None  # name in tables of what all are compared with
    fixed_seeds: bool = False  # claims are about the trained models alone, see `maskft compare --fixed_seeds`
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
    def _write_out(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if ("model" in content) == ("models" in content):
            raise ValueError("it must name the model; write `model: NAME`, or `models: [NAME, NAME]`")
        content = {"models": [content["model"]], **content} if "model" in content else content
        evaluation = content.get("evaluation")
        if isinstance(evaluation, dict) and "before" in evaluation:
            others = {key: value for key, value in evaluation.items() if key != "before"}
            content = content | {"evaluation": others, "evaluation.before": evaluation["before"]}
        methods, train = content.get("methods"), content.get("train") or {}
        if content.get("path") and PRETRAINED not in [
            m.get("method") for m in (methods or {}).values() if isinstance(m, dict)
        ]:
            raise ValueError(f"path measures what training changes: add the model before it, {{method: {PRETRAINED}}}")
        controls = content.get("controls")
        if (
            (controls == "standard" or isinstance(controls, list))
            and isinstance(methods, dict)
            and isinstance(train, dict)
        ):
            masks = controls if isinstance(controls, list) else None
            added = with_standard_controls(methods, train, masks, content.get("grid") or ())
            content = content | {"methods": added}
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
        if name in (".", "..") or "/" in name:
            raise ValueError(f"name is {name!r}; it names a folder, so give a word without a slash")
        return name

    @field_validator("evaluation")
    @classmethod
    def _heldout_is_a_task(cls, section: Options) -> Options:
        """``heldout`` is measured beside the ``tasks``; its options join the others."""
        heldout, tasks = section.get("heldout") or {}, section.get("tasks") or []
        tasks = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
        for name, value, kind, form in (
            ("heldout", heldout, dict, "lines of `name: value`"),
            ("tasks", tasks, list, "a list of names"),
        ):
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}; it must be {form}")
        options = {key: value for key, value in section.items() if key not in ("heldout", "tasks")}
        if tasks:
            is_missing = (heldout or "dataset_name" in options) and "heldout" not in tasks
            options["tasks"] = (["heldout"] if is_missing else []) + tasks
        return options | heldout

    @field_validator("before")
    @classmethod
    def _has_tasks_and_heldout(cls, sets: dict[str, Options]) -> dict[str, Options]:
        return {name: cls._heldout_is_a_task(section) for name, section in sets.items()}

    @model_validator(mode="after")
    def _chooses_of_every_path(self) -> Recipe:
        """A trained method whose settings are given has points to choose from all the same."""
        if self.path and self.path.choose:
            for method in self.methods.values():
                if method.tune and (method.tune.halving or method.tune.double):
                    raise ValueError(
                        f"methods.{method.name}.tune halves or doubles, and path.choose takes a grid alone"
                    )
                if method.last:
                    raise ValueError(f"methods.{method.name}.last: path.choose names the model that is kept; drop last")
            trained = [name for name, m in self.methods.items() if m.method not in (PRETRAINED, *UNTRAINED_METHODS)]
            tuned = {
                name: self.methods[name].model_copy(update={"tune": self.methods[name].tune or Tuning.nothing()})
                for name in trained
            }
            self.__dict__["methods"] = self.methods | tuned
        return self

    @model_validator(mode="after")
    def _has_no_name_twice(self) -> Recipe:
        labels = [label for method in self.methods.values() for label in method.labels]
        lists = {"models": self.models, "seeds": self.seeds, "methods and their `last`": labels}
        lists |= {f"grid {key!r}": values for key, values in self.grid.items()}
        for method in (method for method in self.methods.values() if method.tune):
            lists |= {f"methods.{method.name}.tune.{key}": values for key, values in method.tune.lists.items()}
        lists |= {f"seeds of method {name!r}": method.seeds or [] for name, method in self.methods.items()}
        for where, values in lists.items():
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                raise ValueError(f"{where}: {twice!r} stands there twice, and two runs would have one name; drop one")
        _check_known("baseline", self.baseline, labels)
        return self

    @model_validator(mode="after")
    def _is_made_from_what_is_there(self) -> Recipe:
        for key in self.grid:
            name, dot, option = key.rpartition(".")
            if not dot or name not in self.methods:
                raise ValueError(f"grid: {key!r} must be METHOD.OPTION{did_you_mean(name, self.methods)}")
            if (tune := self.methods[name].tune) and option in tune.grid:
                raise ValueError(f"grid: {key!r} stands in the method's tune too; drop one")
        for seed in self.tune_seeds or []:
            if seed not in self.seeds:
                raise ValueError(f"tune_seeds has {seed}, which is none of the seeds {self.seeds}; add it there")
        for name, method in self.methods.items():
            _check_known(f"methods.{name}.from", method.start, self.methods)
            _check_known(f"methods.{name}.match", method.match, self.methods)
            for option, mask in method.masks.items():
                _check_known(f"methods.{name}.{option}", mask, self.methods)
            _check_known(f"methods.{name}.data", method.data, self.data)
            if method.seeds and len(self.seeds) > 1 and method.seeds != self.seeds:
                raise ValueError(
                    f"methods.{name}.seeds is {method.seeds} and those of the study are {self.seeds}; they are paired "
                    "by seed; give a method its own seeds only where the study has one"
                )
        for name, method in self.methods.items():
            _check_no_cycle(self.methods, [name])
            if self.path and method.masks and method.method == PEFT:
                raise ValueError(f"methods.{name} has start_mask, and a path measures adapters over the model as it is")
            match, start = self.methods.get(method.match), self.methods.get(method.start)
            if match and match.method != "mask":
                raise ValueError(f"methods.{name}.match is {match.name!r}, which is no learned mask")
            for option, mask in ((option, self.methods[mask]) for option, mask in method.masks.items()):
                if mask.method not in MASK_METHODS or mask.start != method.start:
                    raise ValueError(
                        f"methods.{name}.{option} is {mask.name!r}; name a mask made from the same model, "
                        f"`from: {method.start}`"
                    )
                if (self.train | mask.options).get("mask_removed_value") == "base":
                    raise ValueError(
                        f"methods.{name}.{option} is {mask.name!r}, a difference mask, whose removed weights are not "
                        "zero; name one that removes to zero"
                    )
            if start and start.method not in (PRETRAINED, "full"):
                raise ValueError(
                    f"methods.{name}.from is {start.name!r}, an adapter of method {start.method}; start from full "
                    "fine-tuning"
                )
        return self


def _check_known(where: str, name: str | None, known: list[str] | dict[str, Any]) -> None:
    if name is not None and name not in known:
        raise ValueError(f"{where} is {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")


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
    data, train, evaluation = recipe.data, dict(recipe.train), recipe.evaluation
    if TEMPLATE in train:
        train[TEMPLATE] = template = str(source.parent / Path(str(train[TEMPLATE])).expanduser())
        if not Path(template).is_file():
            raise UserError(f"{source}: {TEMPLATE} is {template!r}, no file; its place counts from the recipe")
    if data_dir is not None:
        of_data = {name: in_data_dir(part.options, data_dir) for name, part in data.items()}
        data = {name: part.model_copy(update={"options": of_data[name]}) for name, part in data.items()}
        if "tasks" in evaluation or "dataset_name" in evaluation:
            evaluation = in_data_dir(evaluation, data_dir)
    # Of the pre-trained model too: all rows of the table answer to the same prompts.
    evaluation = {key: train[key] for key in (TEMPLATE, REVISION) if key in train} | evaluation
    how = {key: value for key, value in evaluation.items() if key in HOW}
    of_heldout = {key: value for key, value in evaluation.items() if key in HOW_OF_HELDOUT}

    def completed(sets: dict[str, Options]) -> dict[str, Options]:
        """Sets of earlier abilities with what they share with ``evaluation``."""
        sets = sets if data_dir is None else {name: in_data_dir(options, data_dir) for name, options in sets.items()}
        return {
            name: how | (of_heldout if "heldout" in options.get("tasks", ["heldout"]) else {}) | options
            for name, options in sets.items()
        }

    path = recipe.path and recipe.path.model_copy(update={"before": completed(recipe.path.before)})
    update = {"train": train, "data": data, "evaluation": evaluation, "before": completed(recipe.before), "path": path}
    return recipe.model_copy(update=update)


def as_text(options: Options) -> Options:
    """Mixtures as the command line takes them."""
    return {key: mixture_text(value) if key == "dataset_name" else value for key, value in options.items()}


def in_data_dir(options: Options, data_dir: str | Path) -> Options:
    """Options with ``data_dir``, and file names that mean nothing here replaced by the files of that name in it."""

    def found(name: str) -> str:
        file = Path(data_dir).expanduser() / name
        if not name.lower().endswith(FILE_ENDINGS) or is_there(name):
            return name
        if not file.is_file():
            raise UserError(f"data file {name!r} is neither here nor in data_dir {str(data_dir)!r}")
        return str(file)

    names = {key: options[key] for key in DATA_NAMES if isinstance(options.get(key), str)}
    return options | {key: rename_sets(name, found) for key, name in names.items()} | {"data_dir": str(data_dir)}
