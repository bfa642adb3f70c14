"""The recipe of a study: one YAML file, read into types and checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

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
from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import is_there
from maskft_common.schema import FileModel, Name, read_model
from maskft_common.yaml_file import read_yaml

from .controls import with_standard_controls

PRETRAINED = "pretrained"  # method of a run that trains nothing: the base model itself
CURRENT_RATE = "current"  # learning_rate: that of the schedule of `from` at its best step
REVISION = "model_revision"  # the option that names a revision of a hub model
# How held-out data is evaluated: of `evaluation`, and of each set of earlier abilities unless it says otherwise.
HOW = frozenset("model_revision chat_template_path dtype bf16 device batch_size".split())
HOW_OF_HELDOUT = frozenset("max_length max_new_tokens no_generate dataset_text_field".split())


def _without_repeats(values: list) -> list:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands there twice, and two runs would have one name; drop one")
    return values


def _evaluation(section: dict[str, Any]) -> dict[str, Any]:
    """Options of ``maskft evaluate``: ``heldout`` is measured beside the ``tasks``, and its options join the others."""
    heldout, tasks = section.get("heldout") or {}, section.get("tasks") or []
    tasks = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
    if not isinstance(heldout, dict) or not isinstance(tasks, list):
        raise ValueError("tasks must be a list of names, and heldout lines of `name: value`")
    options = {key: value for key, value in section.items() if key not in ("heldout", "tasks")}
    if tasks:
        is_missing = (heldout or "dataset_name" in options) and "heldout" not in tasks
        options["tasks"] = (["heldout"] if is_missing else []) + tasks
    return as_text(options | heldout)


Count = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Options = dict[str, Any]
Texts = Annotated[Options, AfterValidator(lambda options: as_text(options))]  # mixtures as the command line takes them
Evaluation = Annotated[Options, AfterValidator(_evaluation)]
Values = Annotated[list, Field(min_length=1), AfterValidator(_without_repeats)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_without_repeats)]


class Section(FileModel):
    """A section of a recipe; values are taken as YAML reads them, so ``"8"`` is no number."""

    model_config = ConfigDict(strict=True)


class SectionWithOptions(Section):
    """A section in which every key that is no field is an option of ``maskft train``."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> Options:
        """The options, mixtures as the command line takes them."""
        return as_text(self.model_extra or {})


class Data(SectionWithOptions):
    """One training set, with the part of it that is held out."""

    num_rows: Count | None = None  # to train on, for a dry run where the data is not at hand
    tokens_per_row: Number | None = None  # mean, for the same estimate

    @model_validator(mode="after")
    def _check_name(self) -> Data:
        name = self.options.get("dataset_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"dataset_name is {name!r}; it must be a name, or `name: rows`")
        return self


class TimesParent(Section):
    """Values of an option as multiples of the value that the method's ``from`` has."""

    times_parent: Annotated[list[Number], Field(min_length=1), AfterValidator(_without_repeats)]


class Choice(Section):
    """What held-out rows choose among the points of a method's path: one of the two constraints."""

    accuracy_at_least: Share | None = None  # of the best that any method has; then least forgetting
    forgetting_at_most: Number | None = None  # nats per token; then most accuracy

    @model_validator(mode="after")
    def _check_one(self) -> Choice:
        if (self.accuracy_at_least is None) == (self.forgetting_at_most is None):
            raise ValueError("choose takes one of accuracy_at_least and forgetting_at_most")
        return self


class MethodPath(Section):
    """Section ``path``: where between the base model and the end of training every trained method is measured.

    On the rows held out from training data, and on rows of earlier abilities that the study does not report on.
    """

    before: dict[Annotated[Name, Field(pattern="^[^/]+$")], Texts] = {}  # as evaluation.before, of other rows
    checkpoints: Annotated[list[Share], Field(min_length=1)] = [1.0]  # shares of training, at the whole change
    scales: list[Share] = []  # parts of the change at the end of training, W0 + scale * (W - W0)
    choose: Choice | None = None  # None: the setting with the lowest held-out loss, at its best checkpoint

    @model_validator(mode="after")
    def _check_measured(self) -> MethodPath:
        is_measured = any(not each.get("kl") for each in self.before.values())
        if self.choose and self.choose.forgetting_at_most is not None and not is_measured:
            raise ValueError("choose.forgetting_at_most needs a set in path.before whose loss is measured (not kl)")
        return self

    @property
    def points(self) -> list[tuple[float, float]]:
        """Share of training and part of the change of every point."""
        return list(dict.fromkeys([*((share, 1.0) for share in self.checkpoints), *((1.0, s) for s in self.scales)]))


# Keys of a method -> the methods that they go with.
_KEYS = {
    **dict.fromkeys(("from", "data", "seeds", "options"), METHODS),
    **dict.fromkeys(("tune", "last"), tuple(method for method in METHODS if method not in UNTRAINED_METHODS)),
    "match": FIXED_MASK_METHODS,
    "start_mask": ("full", PEFT),  # an adapter trained after a mask is merged at its end
    "keep_mask": ("full",),
}


class Method(SectionWithOptions):
    """One line of the table: what is trained, from which model, with which options."""

    name: str = Field(default="", alias="(its key in the recipe)")  # in tables
    method: Literal[(PRETRAINED, *METHODS)]
    start: str | None = Field(default=None, alias="from")  # the method whose best checkpoint it starts from
    match: str | None = None  # the learned mask whose counts a fixed mask takes
    start_mask: str | None = None  # the mask after which all weights of `from` train
    keep_mask: str | None = None  # the mask whose removed weights of `from` stay zero while the others train
    tune: dict[str, Values | TimesParent] | None = None  # options whose values the held-out rows choose
    tuned_elsewhere: Count | None = None  # settings that an earlier study tried, whose choice stands in the options
    data: str | None = None  # None: the recipe's first
    last: str | None = None  # name of the model at the end of training beside the best one; None: not kept
    seeds: Seeds | None = None  # None: those of the study

    @model_validator(mode="after")
    def _check_keys(self) -> Method:
        for key, methods in _KEYS.items():
            if getattr(self, "start" if key == "from" else key) and self.method not in methods:
                raise ValueError(f"{key} is for {', '.join(methods)}, and method is {self.method}; drop it")
        if self.method == INTERPOLATE and self.start is None:
            raise ValueError("interpolate mixes a method's model with what it was made from; name it in `from`")
        if len(self.masks) > 1 or (self.method == PEFT and self.masks and self.last):
            raise ValueError("start_mask, keep_mask and, for an adapter, last: one of them; drop the other")
        twice = set(self.tune or ()) & self.options.keys()
        if twice:
            raise ValueError(f"{min(twice)} stands both in tune and beside it; drop one")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the method's models in tables: the best, and where it is kept the last."""
        return [f"{self.name} (best)", f"{self.name} ({self.last})"] if self.last else [self.name]

    @property
    def masks(self) -> dict[str, str]:
        """Option of ``maskft train`` -> name of the method whose mask full fine-tuning starts with or keeps."""
        named = {"start_mask": self.start_mask, "keep_mask": self.keep_mask}
        return {option: name for option, name in named.items() if name is not None}

    @property
    def parents(self) -> dict[str, str]:
        """Key -> name of the method that this one is made from."""
        named = {"from": self.start, "match": self.match, **self.masks}
        return {key: name for key, name in named.items() if name is not None}


def _named(methods: dict[str, Method]) -> dict[str, Method]:
    return {name: method.model_copy(update={"name": name}) for name, method in methods.items()}


Methods = Annotated[dict[Name, Method], Field(min_length=1), AfterValidator(_named)]


class Launch(Section):
    """How a run is started."""

    accelerate_config: str | None = None  # fsdp2, multi_gpu, ... of TRL, or a file of `accelerate config`
    num_processes: Count | None = None  # None: as accelerate_config says, else 1
    num_cpus: Number = 1  # that a run takes on a cluster
    num_gpus: Annotated[float, Field(ge=0)] = 0


class Recipe(Section):
    """A study."""

    version: Literal[1]
    name: Annotated[Name, Field(pattern=r"^[^/]*[^/.][^/]*$")]  # of the folder and of the tables
    model: str
    data: Annotated[dict[str, Data], Field(min_length=1)]
    methods: Methods
    controls: Literal["standard"] | list[str] | None = None  # see controls.py; a list: of these masks
    train: Texts = {}  # for all methods
    seeds: Seeds = [0]
    grid: dict[str, Values] = {}  # METHOD.OPTION -> values
    evaluation: Evaluation = {}  # of `maskft evaluate`; in the file those of held-out data stand under `heldout`
    before: dict[str, Evaluation] = Field(default={}, alias="evaluation.before")  # held-out data of earlier abilities
    path: MethodPath | None = None
    baseline: str | None = None  # name in tables of what all are compared with
    fixed_seeds: bool = False  # claims are about the trained models alone, see `maskft compare --fixed_seeds`
    tokens_per_s: Number | None = None  # of full fine-tuning on the hardware meant; for a dry run and nothing else
    launch: Launch = Launch()

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
        evaluation = content.get("evaluation")
        if isinstance(evaluation, dict) and "before" in evaluation:
            others = {key: value for key, value in evaluation.items() if key != "before"}
            content = content | {"evaluation": others, "evaluation.before": evaluation["before"]}
        controls, methods, train = content.get("controls"), content.get("methods"), content.get("train") or {}
        if (controls == "standard" or isinstance(controls, list)) and isinstance(methods, dict | None):
            masks = controls if isinstance(controls, list) else None
            grid, train = (value if isinstance(value, dict) else {} for value in (content.get("grid"), train))
            content = content | {"methods": with_standard_controls(methods or {}, train, masks, grid)}
        return content

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        _check_known("baseline", self.baseline, [label for each in self.methods.values() for label in each.labels])
        for key, (name, option) in zip(self.grid, self.axes, strict=True):
            _check_known(f"grid {key}: the method", name, self.methods)
            if option in (self.methods[name].tune or ()):
                raise ValueError(f"grid: {key!r} stands in the method's tune too; drop one")
        for name, method in self.methods.items():
            for key, parent in method.parents.items():
                _check_known(f"methods.{name}.{key}", parent, self.methods)
            _check_known(f"methods.{name}.data", method.data, self.data)
            if method.seeds and len(self.seeds) > 1 and method.seeds != self.seeds:
                raise ValueError(f"methods.{name}.seeds differs from seeds {self.seeds}, which pair the runs; drop it")
        try:
            TopologicalSorter({name: method.parents.values() for name, method in self.methods.items()}).prepare()
        except CycleError as error:
            raise ValueError(f"the runs form a cycle: {' -> '.join(error.args[1])}; break it") from None
        return self

    @model_validator(mode="after")
    def _check_parents(self) -> Recipe:
        for name, method in self.methods.items():
            made = {key: self.methods[parent] for key, parent in method.parents.items()}
            start, match = made.pop("from", None), made.pop("match", None)
            key = "start_mask" if made else "from" if start and start.method == "full" else None
            if self.path and key and method.method in (*MASK_METHODS, PEFT):
                raise ValueError(
                    f"methods.{name}.{key} is {method.parents[key]!r}, and a path measures adapters over the model "
                    f"before training; drop {key} or path"
                )
            if match and match.method != "mask":
                raise ValueError(f"methods.{name}.match is {match.name!r}, which is no learned mask")
            if start and start.method not in (PRETRAINED, "full"):
                raise ValueError(f"methods.{name}.from is {start.name!r}, an adapter; start from full fine-tuning")
            chosen = [each.name for each in (start, *made.values()) if each and each.method in ("full", "mask")]
            is_current = method.options.get("learning_rate") == CURRENT_RATE
            if chosen and self.path and self.path.choose and (self.path.scales or is_current):
                raise ValueError(
                    f"methods.{name} starts from {chosen[0]!r}, of which path.choose may take a part of the change or "
                    f"another checkpoint than the best; drop choose, or scales and learning_rate {CURRENT_RATE}"
                )
            for option, mask in made.items():
                if mask.method not in MASK_METHODS or mask.start != method.start:
                    raise ValueError(f"methods.{name}.{option} is {mask.name!r}; name a mask made from the same model")
        return self

    @model_validator(mode="after")
    def _choose_of_every_path(self) -> Recipe:
        """A trained method whose settings are given has points to choose from all the same."""
        if self.path and not any(method.method == PRETRAINED for method in self.methods.values()):
            raise ValueError(f"path measures what training changes: add the model before it, {{method: {PRETRAINED}}}")
        if self.path and "heldout" in self.path.before:
            raise ValueError("path.before: heldout are the rows that choose; give the set another name")
        for name, method in self.methods.items() if self.path and self.path.choose else ():
            if method.last:
                raise ValueError(f"methods.{name}: path.choose chooses the checkpoint; drop last")
            if method.method not in (PRETRAINED, *UNTRAINED_METHODS):
                self.methods[name] = method.model_copy(update={"tune": method.tune or {}})
        return self


def _check_known(where: str, name: str | None, known: Collection[str]) -> None:
    if name is not None and name not in known:
        raise ValueError(f"{where} is {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")


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
    train = dict(recipe.train)
    if TEMPLATE in train:
        train[TEMPLATE] = template = str(source.parent / Path(str(train[TEMPLATE])).expanduser())
        if not Path(template).is_file():
            raise UserError(f"{source}: {TEMPLATE} is {template!r}, no file; its place counts from the recipe")
    data = {name: part.model_copy(update=in_data_dir(part.options, data_dir)) for name, part in recipe.data.items()}
    evaluation = recipe.evaluation
    if "tasks" in evaluation or "dataset_name" in evaluation:
        evaluation = in_data_dir(evaluation, data_dir)
    # Of the pre-trained model too: all rows of the table answer to the same prompts.
    evaluation = {key: train[key] for key in (TEMPLATE, REVISION) if key in train} | evaluation
    how = {key: value for key, value in evaluation.items() if key in HOW}
    of_heldout = {key: value for key, value in evaluation.items() if key in HOW_OF_HELDOUT}

    def completed(sets: dict[str, Options]) -> dict[str, Options]:
        """Sets of earlier abilities with what they share with ``evaluation``."""
        return {
            name: how
            | (of_heldout if "heldout" in options.get("tasks", ["heldout"]) else {})
            | in_data_dir(options, data_dir)
            for name, options in sets.items()
        }

    path = recipe.path and recipe.path.model_copy(update={"before": completed(recipe.path.before)})
    update = {"train": train, "data": data, "evaluation": evaluation, "before": completed(recipe.before), "path": path}
    return recipe.model_copy(update=update)


def as_text(options: Options) -> Options:
    """Mixtures as the command line takes them."""
    return {key: mixture_text(value) if key in DATA_NAMES else value for key, value in options.items()}


def in_data_dir(options: Options, data_dir: str | Path | None) -> Options:
    """Options with ``data_dir``, and file names that mean nothing here replaced by the files of that name in it."""
    if data_dir is None:
        return options

    def found(name: str) -> str:
        file = Path(data_dir).expanduser() / name
        if not name.lower().endswith(FILE_ENDINGS) or is_there(name):
            return name
        if not file.is_file():
            raise UserError(f"data file {name!r} is neither here nor in data_dir {str(data_dir)!r}")
        return str(file)

    names = {key: options[key] for key in DATA_NAMES if isinstance(options.get(key), str)}
    return options | {key: rename_sets(name, found) for key, name in names.items()} | {"data_dir": str(data_dir)}
