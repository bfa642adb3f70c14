"""The recipe of a study: the types that its YAML file is read into, with the checks that need nothing else.

``load_recipe.py`` reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from maskft.data.arguments import DATA_NAMES, KL_DATA, mixture_text
from maskft.training.method_arguments import (
    FIXED_MASK_METHODS,
    INTERPOLATE,
    MASK_METHODS,
    METHODS,
    PEFT,
    UNTRAINED_METHODS,
)
from maskft.training.peft_config import config_of_name
from maskft_common.errors import did_you_mean
from maskft_common.method_options import false_as_no
from maskft_common.schema import FileModel, Name

PRETRAINED = "pretrained"  # the method of a run that trains nothing: the base model itself
CURRENT_RATE = "current"  # learning_rate: the rate that the schedule of `from` had at its best step
REVISION = "model_revision"  # the option that names a revision of a hub model

# torch takes seeds of 64 bits, numpy (behind transformers.set_seed) of 32.
MAX_SEED = 2**32 - 1

# Methods whose models are an adapter or a mask over the model before training.
_OVER_BASE = (*MASK_METHODS, PEFT)


def as_text(options: dict[str, Any]) -> dict[str, Any]:
    """Options with mixtures, and values called ``no``, as the command line takes them."""
    texts = false_as_no(options)
    # In a recipe a mixture may be written as `name: rows`, a line each.
    for key in (*DATA_NAMES, KL_DATA):
        if key in texts:
            texts[key] = mixture_text(texts[key])
    return texts


def _without_repeats(values: list) -> list:
    for index, value in enumerate(values):
        # Not by a set: values of a grid may be lists, which have no hash.
        if value in values[:index]:
            raise ValueError(f"duplicate value {value!r}")
    return values


def _evaluation(section: dict[str, Any]) -> dict[str, Any]:
    """Options of ``maskft evaluate``: ``heldout`` becomes one of the tasks, and its options join the others."""
    # Both may be null in the file.
    heldout = section.get("heldout") or {}
    tasks = section.get("tasks") or []
    if isinstance(tasks, str):  # as on the command line
        tasks = [name.strip() for name in tasks.split(",")]
    if not isinstance(heldout, dict) or not isinstance(tasks, list):
        raise ValueError("tasks must be a list of names, and heldout lines of `name: value`")

    options = {}
    for key, value in section.items():
        if key not in ("heldout", "tasks"):
            options[key] = value

    if tasks:  # without tasks, only held-out rows are evaluated
        has_rows = bool(heldout) or "dataset_name" in options
        if has_rows and "heldout" not in tasks:
            tasks = ["heldout", *tasks]
        options["tasks"] = tasks
    return as_text(options | heldout)


# Numbers with their ranges. A wrong value is an error when the recipe is read, not hours later in a run.
Count = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]

# Options of commands: any, because the parser of the command checks them, see check.py.
Options = dict[str, Any]
Texts = Annotated[Options, AfterValidator(as_text)]
Evaluation = Annotated[Options, AfterValidator(_evaluation)]

# Lists whose every value is a run: two equal ones would be two runs with one name.
Values = Annotated[list, Field(min_length=1), AfterValidator(_without_repeats)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_without_repeats)]


class Section(FileModel):
    """A section of a recipe; values keep the type YAML gives them, so ``"8"`` is not a number."""

    model_config = ConfigDict(strict=True)


class SectionWithOptions(Section):
    """A section whose other keys are options of ``maskft train``."""

    # Added to the parents' configuration, which stays strict and frozen.
    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> Options:
        """The options, with mixtures as the command line takes them."""
        return as_text(self.model_extra or {})


class Data(SectionWithOptions):
    """One training set, and the part of it that is held out."""

    # Training rows and their mean length, for a dry run on a machine without the data.
    num_rows: Count | None = None
    tokens_per_row: Number | None = None

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
    """How held-out rows choose a point of a method's path: by one of the two constraints."""

    # Share of the best gain of any method; of the points that reach it, the one with the least forgetting.
    accuracy_at_least: Share | None = None
    # Nats per token; of the points within, the one with the highest gain.
    forgetting_at_most: Number | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Choice:
        has_accuracy = self.accuracy_at_least is not None
        has_forgetting = self.forgetting_at_most is not None
        if has_accuracy == has_forgetting:  # both or neither
            raise ValueError("choose takes one of accuracy_at_least and forgetting_at_most")
        return self


class MethodPath(Section):
    """Section ``path``: where between the base model and the end of training every trained method is measured.

    The measurements use rows held out from training data, and rows of earlier abilities that the study does not report.
    """

    # As evaluation.before, of other rows. The name is part of a folder's, so it has no slash.
    before: dict[Annotated[Name, Field(pattern="^[^/]+$")], Texts] = {}
    # Shares of training, with the whole change of the weights.
    checkpoints: Annotated[list[Share], Field(min_length=1)] = [1.0]
    # Fractions of the change at the end of training, W0 + scale * (W - W0).
    scales: list[Share] = []
    # None: the setting with the lowest held-out loss, at its best checkpoint.
    choose: Choice | None = None

    @model_validator(mode="after")
    def _check_measured(self) -> MethodPath:
        if self.choose is None or self.choose.forgetting_at_most is None:
            return self

        # Sets with `kl` are measured by the divergence from the base model, which is no loss.
        measure_kl = [bool(options.get("kl")) for options in self.before.values()]
        if all(measure_kl):
            raise ValueError("choose.forgetting_at_most needs a set in path.before whose loss is measured (not kl)")
        return self

    @property
    def points(self) -> list[tuple[float, float]]:
        """Share of training and fraction of the change of every point, both in (0, 1]."""
        along_training = [(share, 1.0) for share in self.checkpoints]
        along_change = [(1.0, scale) for scale in self.scales]
        # The end of training with the whole change may be in both.
        return list(dict.fromkeys(along_training + along_change))


_TRAINED = tuple(method for method in METHODS if method not in UNTRAINED_METHODS)

# Keys of a method -> the methods that may have them.
_METHODS_WITH = {
    "from": METHODS,
    "data": METHODS,
    "seeds": METHODS,
    "options": METHODS,
    "tune": _TRAINED,
    "last": _TRAINED,
    "match": FIXED_MASK_METHODS,
    "start_mask": ("full", PEFT),  # an adapter trained after a mask is merged at its end
    "keep_mask": ("full",),
}


class Method(SectionWithOptions):
    """One line of the table: the training, the model it starts from, its options.

    Attributes:
        start: The method whose best checkpoint it starts from; key ``from``.
        match: The learned mask whose counts a fixed mask takes.
        start_mask: The mask after which all weights of ``from`` train.
        keep_mask: The mask whose removed weights of ``from`` stay zero while the others train.
        tune: Options whose values the held-out rows choose.
        tuned_elsewhere: Number of settings that an earlier study tried; its choice is in the options.
        data: Name of the training set; None: the recipe's first.
        last: Name of the model at the end of training beside the best one; None: not kept.
        seeds: None: the study's.
    """

    # In tables. Set from the method's key (`_named`); an alias that nobody writes keeps `name` from being a key itself.
    name: str = Field(default="", alias="(its key in the recipe)")
    # A Literal of a tuple is one of its members.
    method: Literal[(PRETRAINED, *METHODS)]
    start: str | None = Field(default=None, alias="from")
    match: str | None = None
    start_mask: str | None = None
    keep_mask: str | None = None
    tune: dict[str, Values | TimesParent] | None = None
    tuned_elsewhere: Count | None = None
    data: str | None = None
    last: str | None = None
    seeds: Seeds | None = None

    @field_validator("method", mode="before")
    @classmethod
    def _check_name(cls, method: Any) -> Any:
        config = config_of_name(method)
        if config is not None:
            # JSON is YAML too.
            raise ValueError(
                f"{method!r} is an adapter of PEFT's: write method: peft and peft_config: {json.dumps(config)}"
            )
        return method

    @model_validator(mode="after")
    def _check_keys(self) -> Method:
        for key, methods in _METHODS_WITH.items():
            # `from` is a keyword of Python, so its field is called `start`.
            value = self.start if key == "from" else getattr(self, key)
            if value and self.method not in methods:
                all_methods = ", ".join(methods)
                raise ValueError(f"{key} is for {all_methods}, not for method {self.method}")

        # Then keys that are missing, or that exclude each other.
        if self.method == INTERPOLATE and self.start is None:
            raise ValueError("interpolate needs `from`: the method whose model is mixed with the model before it")

        # An adapter that was trained after a mask is merged at its end: no adapter of the last step is kept beside it.
        is_merged_adapter = self.method == PEFT and bool(self.masks)
        has_two_masks = len(self.masks) > 1
        if has_two_masks or (is_merged_adapter and self.last):
            raise ValueError("only one of start_mask, keep_mask and (for an adapter) last is possible")

        tuned = self.tune or {}
        in_both = tuned.keys() & self.options.keys()
        if in_both:
            first = min(in_both)  # by name, so that the message is the same each time
            raise ValueError(f"{first} has values in tune and one beside it; remove one of them")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether something is trained: not for the base model, interpolation, and masks that are computed."""
        return self.method not in (PRETRAINED, *UNTRAINED_METHODS)

    @property
    def labels(self) -> list[str]:
        """Names of the method's models in tables: the best, and the last where it is kept."""
        if self.last:
            return [f"{self.name} (best)", f"{self.name} ({self.last})"]
        return [self.name]

    @property
    def masks(self) -> dict[str, str]:
        """Option of ``maskft train`` -> name of the method whose mask full fine-tuning starts with or keeps."""
        named = {}
        if self.start_mask is not None:
            named["start_mask"] = self.start_mask
        if self.keep_mask is not None:
            named["keep_mask"] = self.keep_mask
        return named

    @property
    def parents(self) -> dict[str, str]:
        """Key -> name of the method that this one is made from."""
        named = {}
        if self.start is not None:
            named["from"] = self.start
        if self.match is not None:
            named["match"] = self.match
        return named | self.masks


def _named(methods: dict[str, Method]) -> dict[str, Method]:
    """Give each method its key in the recipe as its name."""
    named = {}
    for name, method in methods.items():
        named[name] = method.model_copy(update={"name": name})
    return named


Methods = Annotated[dict[Name, Method], Field(min_length=1), AfterValidator(_named)]


class Launch(Section):
    """How a run is started."""

    # fsdp2, multi_gpu, ... of TRL, or a file of `accelerate config`.
    accelerate_config: str | None = None
    # None: as accelerate_config says, else 1.
    num_processes: Count | None = None
    # Per run, on a cluster.
    num_cpus: Number = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0


class Recipe(Section):
    """A study.

    Attributes:
        controls: ``standard``, or the learned masks that get the standard controls; see ``controls.py``.
        train: Options of ``maskft train`` for all methods.
        grid: METHOD.OPTION -> values.
        evaluation: Options of ``maskft evaluate``; in the file, options of held-out rows are below ``heldout``.
        before: Held-out rows of earlier abilities, ``evaluation.before`` in the file.
        baseline: The name in tables that all others are compared with.
        fixed_seeds: Claims are about the trained models alone, see ``maskft compare --fixed_seeds``.
        tokens_per_s: Speed of full fine-tuning on the intended hardware, for dry runs only.
    """

    # Of the format, so that a later one can tell old recipes.
    version: Literal[1]
    name: Annotated[Name, Field(pattern=r"^[^/]*[^/.][^/]*$")]  # of the folder and of the tables
    model: str
    data: Annotated[dict[str, Data], Field(min_length=1)]
    methods: Methods
    controls: Literal["standard"] | list[str] | None = None
    train: Texts = {}
    seeds: Seeds = [0]
    grid: dict[str, Values] = {}
    evaluation: Evaluation = {}
    before: dict[str, Evaluation] = Field(default={}, alias="evaluation.before")
    path: MethodPath | None = None
    baseline: str | None = None
    fixed_seeds: bool = False
    tokens_per_s: Number | None = None
    # One object for all recipes is safe: models of files are frozen, and pydantic copies the empty dictionaries above.
    launch: Launch = Launch()

    @property
    def first_data(self) -> str:
        """Name of the training set of methods that name none."""
        return next(iter(self.data))

    def data_name(self, method: Method) -> str:
        """Name of a method's training set."""
        return method.data or self.first_data

    @property
    def axes(self) -> dict[tuple[str, str], list]:
        """The grid: (name of a method, option) -> values."""
        axes = {}
        for key, values in self.grid.items():
            name, _, option = key.rpartition(".")  # from the right: names of methods may have dots, options none
            axes[name, option] = values
        return axes

    @model_validator(mode="before")
    @classmethod
    def _lift_before(cls, content: Any) -> Any:
        """Take ``before`` out of ``evaluation``: it has other types than the options around it."""
        if not isinstance(content, dict):
            return content
        if "evaluation.before" in content:  # the name that is given to it below
            raise ValueError("unknown key 'evaluation.before'; write evaluation: {before: ...}")
        # Anything of a wrong type is left to pydantic, whose messages name the place.
        evaluation = content.get("evaluation")
        if not isinstance(evaluation, dict) or "before" not in evaluation:
            return content

        others = dict(evaluation)
        before = others.pop("before")
        return content | {"evaluation": others, "evaluation.before": before}

    @model_validator(mode="after")
    def _check_names(self) -> Recipe:
        # The baseline.
        labels: list[str] = []
        for method in self.methods.values():
            labels += method.labels
        # A name in tables, which differs from the method's key where `last` keeps two models.
        _check_known("baseline", self.baseline, labels)

        # The grid.
        for key in self.grid:
            name, _, option = key.rpartition(".")
            _check_known(f"grid {key}: the method", name, self.methods)
            tuned = self.methods[name].tune or {}
            if option in tuned:
                raise ValueError(f"grid: {key!r} is in the method's tune too; remove one of them")

        # The methods.
        for name, method in self.methods.items():
            for key, parent in method.parents.items():
                _check_known(f"methods.{name}.{key}", parent, self.methods)
            _check_known(f"methods.{name}.data", method.data, self.data)

            # Methods are compared seed by seed, so all have the seeds of the study, unless that has only one.
            if not method.seeds or len(self.seeds) == 1:
                continue
            if method.seeds != self.seeds:
                raise ValueError(
                    f"methods.{name}.seeds is {method.seeds}, but seeds {self.seeds} pair the runs; remove it"
                )
        return self

    @model_validator(mode="after")
    def _check_no_cycle(self) -> Recipe:
        parents = {}
        for name, method in self.methods.items():
            parents[name] = method.parents.values()

        # graphlib finds the cycle and names its members; the order that it could give is not needed here.
        try:
            TopologicalSorter(parents).prepare()
        except CycleError as error:
            cycle = error.args[1]  # names, the first also at the end
            members = " -> ".join(cycle)
            raise ValueError(f"the runs form a cycle: {members}; break it") from None
        return self

    @model_validator(mode="after")
    def _check_parents(self) -> Recipe:
        for name, method in self.methods.items():
            # The methods that this one is made from; `_check_names` has found that they exist.
            start = None
            if method.start:
                start = self.methods[method.start]
            match = None
            if method.match:
                match = self.methods[method.match]
            masks = {}
            for option, mask in method.masks.items():
                masks[option] = self.methods[mask]

            self._check_over_base(name, method, start)
            if match and match.method != "mask":
                raise ValueError(f"methods.{name}.match is {match.name!r}, which is not a learned mask")
            if start and start.method not in (PRETRAINED, "full"):
                raise ValueError(f"methods.{name}.from is {start.name!r}, an adapter; start from full fine-tuning")
            parents = [start, *masks.values()]
            self._check_start_of_path(name, method, parents)

            # The mask is applied to the weights of `from`, so it must have been made for them.
            for option, mask_method in masks.items():
                is_mask = mask_method.method in MASK_METHODS
                is_of_same_model = mask_method.start == method.start
                if not is_mask or not is_of_same_model:
                    raise ValueError(
                        f"methods.{name}.{option} is {mask_method.name!r}; name a mask made from the same model"
                    )
        return self

    def _check_over_base(
        self,
        name: str,
        method: Method,
        start: Method | None,
    ) -> None:
        """With a path, adapters are measured over the model before training, so they must start from it."""
        if not self.path or method.method not in _OVER_BASE:
            return

        # The key that makes it start from another model.
        # The mask first, as a method with a mask may have `from` too.
        key = None
        if method.masks:
            key = "start_mask"
        elif start and start.method == "full":
            key = "from"
        if key:
            raise ValueError(
                f"methods.{name}.{key} is {method.parents[key]!r}, and a path measures adapters over the model "
                f"before training; drop {key} or path"
            )

    def _check_start_of_path(
        self,
        name: str,
        method: Method,
        parents: list[Method | None],
    ) -> None:
        """A run needs a checkpoint to start from, which ``path.choose`` may replace by a scaled model.

        Args:
            name: Of the method.
            method: The method.
            parents: The methods that it starts from, None where there is none.
        """
        if not self.path or not self.path.choose:
            return
        # Fixed masks and the base model have no points to choose from.
        trained = []
        for parent in parents:
            if parent and parent.method in ("full", "mask"):
                trained.append(parent.name)
        if not trained:
            return

        is_current = method.options.get("learning_rate") == CURRENT_RATE
        if self.path.scales or is_current:
            raise ValueError(
                f"methods.{name} starts from {trained[0]!r}, of which path.choose may take a part of the change or "
                f"another checkpoint than the best; drop choose, or scales and learning_rate {CURRENT_RATE}"
            )

    @model_validator(mode="after")
    def _check_last_without_budget(self) -> Recipe:
        """The end of training is the whole change, the best checkpoint the part within the budget."""
        for name, method in self.methods.items():
            # Null of a method takes back what `train` gives all.
            has_budget = (self.train | method.options).get("kl_budget") is not None
            is_varied = "kl_budget" in (method.tune or {}) or f"{name}.kl_budget" in self.grid
            if method.last and (has_budget or is_varied):
                raise ValueError(
                    f"methods.{name}: last is the end of training, which kl_budget does not limit; "
                    "remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _choose_of_every_path(self) -> Recipe:
        """With ``path.choose``, a trained method without ``tune`` has points to choose from too."""
        if not self.path:
            return self

        # Gain and forgetting are differences from the base model, so the study measures that too.
        kinds = {method.method for method in self.methods.values()}
        if PRETRAINED not in kinds:
            raise ValueError(f"path measures what training changes: add the model before it, {{method: {PRETRAINED}}}")
        if "heldout" in self.path.before:
            raise ValueError("path.before: heldout are the rows that choose; give the set another name")
        if not self.path.choose:
            return self

        for name, method in self.methods.items():
            if method.last:
                raise ValueError(f"methods.{name}: path.choose chooses the checkpoint; drop last")
            if method.is_trained and method.tune is None:
                # An empty `tune` is one trial, of the method as it is: its points are the candidates. The recipe is
                # frozen, so the method is replaced inside its dictionary.
                self.methods[name] = method.model_copy(update={"tune": {}})
        return self


def _check_known(
    where: str,
    name: str | None,
    known: Collection[str],
) -> None:
    """Raise for a name that is not among the known ones; None passes."""
    if name is not None and name not in known:
        hint = did_you_mean(name, known)
        all_names = ", ".join(known)
        raise ValueError(f"{where} is {name!r}{hint}; there are {all_names}")
