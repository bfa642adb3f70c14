"""Configuration of a mask adapter: which layers are masked, how scores select weights, and where scores start."""

from __future__ import annotations

import copy
import math
import numbers
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from peft.config import PeftConfig
from torch import Tensor, nn

from maskft_common.errors import UserError, did_you_mean
from maskft_common.layout import ADAPTER_FORMAT_VERSION

from ..masking import RankBy, ScoreStart, check_sparsity
from .adapter_files import adapter_files
from .presets import PRESETS
from .selection import LEARNERS, is_free, learner_options, names_with

# The values that `removed_value` can have, and their functions: (config, model) -> module name -> values that removed
# weights take. An empty dictionary means zero everywhere. ``maskft.learners`` adds ``base``.
RemovedValues = Callable[["MaskConfig", nn.Module], dict[str, Tensor]]
REMOVED_VALUES: dict[str, RemovedValues] = {"zero": lambda config, model: {}}

# Values of `init_scores` that need training rows.
DATA_STARTS = ("wanda",)

# Fields that training and saving fill in.
FILLED_IN = ("mask_sha256", "base_fingerprint", "weights_sha256", "progress", "recipe")

# Fields whose values are numbers, and those that may be None besides; `sparsity` has a check of its own.
_NUMBERS = ("init_std", "sparsity_ramp", "price", "mask_seed", "threshold", "sharpness", "temperature")
_NUMBERS_OR_NONE = ("init_value", "sharpness_end", "temperature_end", "progress")
# Fields that are true or false.
_FLAGS = ("save_scores", "verify_base")
# Fields whose values are names of modules, in a list, or a text: for the first two a regular expression.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


class MaskPeftType(str, Enum):  # noqa: UP042 - PEFT's own PeftType is (str, Enum), and code compares the two
    """PEFT's enum of methods is closed; a str enum of our own has the ``.value`` that transformers reads."""

    MASK = "MASK"


def _option(
    default: Any,
    text: str,
    *,
    is_option: bool = True,
    is_of_removal: bool = True,
) -> Any:
    """A field of :class:`MaskConfig`.

    Args:
        default: Its default.
        text: Its help, with unit and range.
        is_option: Whether ``maskft train`` has an option for it. The other fields are set from Python, or filled in
            when an adapter is saved.
        is_of_removal: Whether the field decides or describes which weights are removed. An adapter that removes no
            weight keeps the default.
    """
    metadata = {
        "help": text,
        "is_option": is_option,
        "is_of_removal": is_of_removal,
    }
    return field(default=default, metadata=metadata)


@dataclass
class MaskConfig(PeftConfig):
    """Mask Fine-Tuning (https://arxiv.org/abs/2503.22764) as a PEFT method.

    ``get_peft_model(model, MaskConfig(...))`` freezes every weight and gives each weight of the chosen linear layers a
    trainable float32 score, ``...mask_scores.<adapter>``. The defaults are the paper's setting. Each field is described
    by its ``metadata["help"]``, which ``maskft train --help`` prints.

    Raises:
        UserError: If a value is outside its range or two settings contradict each other.
    """

    # Which layers are masked: PEFT's own names and matching.
    target_modules: list[str] | str | None = _option(
        None,
        "Names (or a regular expression) of the linear layers to mask, matched as PEFT matches them "
        "(default: every linear layer inside the decoder layers)",
        is_of_removal=False,
    )
    exclude_modules: list[str] | str | None = _option(
        None, "Names (or a regular expression) of layers not to mask.", is_of_removal=False
    )
    layers_to_transform: list[int] | int | None = _option(
        None,
        "Indices of the decoder layers to mask, from 0; not with a regular expression (default: all)",
        is_of_removal=False,
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Name of the list of decoder layers, if it cannot be inferred, e.g. `h`.", is_of_removal=False
    )
    modules_to_save: list[str] | None = _option(
        None, "Modules trained and saved in full beside the mask.", is_of_removal=False
    )

    # How many weights are removed, and how scores select them.
    sparsity: float = _option(0.1, "Fraction of the target weights to REMOVE, in [0, 1). 0.1 removes 10 %.")
    sparsity_ramp: float = _option(
        0.0,
        "With `topk`: share of training, in [0, 1], over which the fraction removed grows from 0 to "
        "`sparsity`, along a cubic; 0: it is `sparsity` from the start.",
    )
    selection: str = _option(
        "topk",
        "`topk` removes exactly `sparsity`; `threshold` removes every weight with score < `threshold`; `logit`, "
        "`gumbel` (sigmoid with noise) and `hard_concrete` (noise, stretched and clipped) remove every weight with "
        "score <= 0. Noise is drawn in training only.",
    )
    gradient: Literal["straight_through", "sigmoid"] = _option(
        "straight_through",
        "With `logit`: the mask's derivative in the backward pass is 1, or that of sigmoid(sharpness * score).",
    )
    price: float = _option(
        0.0,
        "With `logit`, `gumbel`, `hard_concrete`: price * (share removed of each matrix, relaxed) is added "
        "to the loss, >= 0.",
    )
    sharpness: float = _option(1.0, "With `logit` and `gumbel`: factor of the scores inside the sigmoid, > 0.")
    sharpness_end: float | None = _option(
        None, "`sharpness` at the end of training, reached linearly (default: as at the start)"
    )
    temperature: float = _option(4.0, "With `gumbel`: temperature at the start, > 0.")
    temperature_end: float = _option(0.05, "With `gumbel`: temperature at the end of training, reached linearly, > 0.")
    removed_value: str = _option(
        "zero", "Value that removed weights take: `zero`, or `base`, their value in `removed_value_model`."
    )
    removed_value_model: str | None = _option(
        None, "With `removed_value` `base`: the model before fine-tuning, a folder or a hub name."
    )
    # The paper's threshold of global masks (Table 6). With scores from N(0, 0.02), 4 % of them start below it.
    threshold: float = _option(-0.035, "With `threshold`: weights with a score below it are removed.")
    rank_by: RankBy = _option("abs", "`abs` ranks by the magnitude of a score (as published), `signed` by value.")

    # Where scores start.
    init_scores: ScoreStart = _option(
        "normal",
        "Initialization of the scores: normal, constant, or ordered by magnitude or by wanda (magnitude * norm of the "
        "input, which needs training rows).",
    )
    # As in the published code.
    init_std: float = _option(0.02, "Standard deviation of the initial scores, > 0.")
    # None, and not a number, because the default depends on the learner: see `start_value`.
    init_value: float | None = _option(
        None,
        "Value of the `constant` start; with `logit`, `gumbel` and `hard_concrete` the mean of the initial scores "
        "(default: 0, or a value that keeps nearly all weights if scores are cut at 0: 2 * init_std; 3 / sharpness "
        "with `gumbel` and 3 with `hard_concrete` if that is more)",
    )
    mask_seed: int = _option(0, "Seed of the score initialisation, >= 0.", is_of_removal=False)
    preset: str | None = _option(
        None,
        "`paper`: topk, abs, normal(0, 0.02), sparsity 0.1. `recommended`: the same from the "
        "smallest weights on, meant for all layers and learning rate 3e-4. `deletion_tuning`: logits of all "
        "gate_proj from the smallest weights on, sigmoid slope, price 1, sharpness 10 to 100, meant for models that "
        "were not fine-tuned and learning rate 5e-3 (after Deletion Tuning; start and constants are ours).",
    )

    # How an adapter is saved and loaded.
    save_scores: bool = _option(
        False,
        "Also write the float32 scores into the adapter file (4 bytes per weight): to train it further. "
        "Folders named checkpoint-N hold them always; using the mask does not need them.",
        is_option=False,
    )
    verify_base: bool = _option(
        True,
        "Refuse to load onto base weights other than those it was trained on.",
        is_option=False,
        is_of_removal=False,
    )

    # Filled in when an adapter is saved. They say which base the mask belongs to, and what its file must contain.
    format_version: int = _option(
        ADAPTER_FORMAT_VERSION, "Version of the adapter file.", is_option=False, is_of_removal=False
    )
    base_fingerprint: str | None = _option(
        None, "sha256 of the masked base weights, rounded to bfloat16.", is_option=False, is_of_removal=False
    )
    base_quantisation: str | None = _option(
        None,
        "How the masked base weights were stored, such as `bitsandbytes nf4`; null: as floats.",
        is_option=False,
        is_of_removal=False,
    )
    removed_value_fingerprint: str | None = _option(
        None, "sha256 of the same weights in `removed_value_model`.", is_option=False
    )
    progress: float | None = _option(
        None, "Share of training done, in [0, 1], see `set_mask_progress`.", is_option=False
    )
    mask_sha256: str | None = _option(
        None, "sha256 over the masks of all modules.", is_option=False, is_of_removal=False
    )
    weights_sha256: dict[str, str] | None = _option(
        None, "sha256 of each tensor beside the masks: modules_to_save and resized embeddings.", is_option=False
    )
    recipe: dict[str, Any] | None = _option(None, "How the mask was trained, for people to read.", is_option=False)

    # TRL reads this field of every PEFT config.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        None, "Not supported by masks; present because TRL reads it.", is_option=False, is_of_removal=False
    )

    # State that is not saved: dataclasses ignore attributes without an annotation, and those annotated with ClassVar.

    # True from the creation of an adapter to its first load or save. In between, the checksums in the configuration
    # belong to the file that is about to be loaded.
    is_new = False
    # The recipe that a new adapter's configuration came with, of the mask that is about to be loaded. An adapter that
    # is saved without having been loaded is another mask, which the recipe does not describe.
    recipe_of_file = cast("dict[str, Any] | None", None)
    # Whether `progress` came with the configuration, as from a file. It is where an earlier training ended: this one
    # has to set its own.
    is_progress_of_file = False
    # Name of the adapter that this one is a frozen copy of (the reference of preference training), or "".
    copy_of = ""
    # Scores that the adapter file leaves out. `save_pretrained` below writes them if the folder is a checkpoint: the
    # model's state dict is collected before the folder is known.
    scores_of_save: ClassVar[dict[str, Tensor] | None] = None
    # Checksums of the modules that are saved whole beside the mask, from the same moment.
    weights_of_save: ClassVar[dict[str, str] | None] = None
    # Names of the fields that were given, which win over a preset even where they equal a default.
    given = frozenset[str]()
    # Values of the fields that training and saving fill in, as they were given: those of the file, or None.
    filled_from_file = cast("dict[str, Any]", {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember which fields are given: the ``__init__`` that dataclasses write cannot tell them from defaults."""
        config = super().__new__(cls)
        config.given = frozenset(kwargs)
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MaskPeftType.MASK
        # First, because a newer version may give the other fields values that the checks below do not know.
        if not isinstance(self.format_version, int):
            raise UserError(f"format_version is {self.format_version!r}; it must be a whole number")
        if self.format_version > ADAPTER_FORMAT_VERSION:
            raise UserError(
                f"the adapter has format version {self.format_version}, this maskft reads up to "
                f"{ADAPTER_FORMAT_VERSION}; use a newer one"
            )
        # The preset before the checks, so that its values are checked together with those given beside it. Then the
        # simple checks before the combined ones, which read numbers and look up learners by name.
        self._normalize()
        self._apply_preset()
        self._check_choices()
        self._check_values()
        self._check_layers()
        # A saved adapter was checked when it was created.
        if not self.is_saved:
            self._check_effects()
        self._check_combinations()
        self.filled_from_file = {name: getattr(self, name) for name in FILLED_IN}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; PEFT has written the tensors of the adapter before.

        Raises:
            UserError: If PEFT's ``path_initial_model_for_weight_conversion`` is given.
        """
        # PEFT sets this attribute, which is not a field, for that argument alone. It is about to write the trained
        # mask's configuration into the folder of the initial one, and to raise only then.
        if hasattr(self, "init_weights"):
            raise UserError(
                "path_initial_model_for_weight_conversion is for LoRA that has changed the base weights, and masks "
                "leave them as they are: leave it out"
            )
        # PEFT replaces 20 names or more by a set of shorter ones, which each process would save in another order.
        self._normalize()
        # Passed on as a function: `files` has steps before and after it.
        save = super().save_pretrained
        files = adapter_files()
        files.save_config(self, Path(save_directory), lambda: save(save_directory, **kwargs))

    @property
    def ranks_by(self) -> RankBy:
        """``abs`` or ``signed``: scores that are cut at 0 are always compared by value."""
        if is_free(self.selection):
            return "signed"
        return self.rank_by

    @property
    def start_value(self) -> float:
        """``init_value``; if it is not given and scores are cut at 0, a value that keeps nearly all weights.

        With a mean of two standard deviations, 97.7 % of normally distributed scores are above 0, and all scores that
        are spread by rank. Gates that began at 0, half of them closed, did not recover (docs/LOG.md).
        """
        if self.init_value is not None:
            return self.init_value

        start = LEARNERS[self.selection].start
        if start is None:  # the learner does not cut at 0
            return 0.0
        least = start(self)
        return max(2 * self.init_std, least)

    @property
    def starts_from_data(self) -> bool:
        """Whether scores are unknown until training rows have been seen, see ``start_scores``."""
        return self.init_scores in DATA_STARTS

    @property
    def beside_preset(self) -> dict[str, Any]:
        """Fields whose value differs from ``preset``, because it was given beside it."""
        changed = {}
        preset = PRESETS.get(str(self.preset), {})
        for name, value_of_preset in preset.items():
            value = getattr(self, name)
            if value != value_of_preset:
                changed[name] = value
        return changed

    @property
    def is_saved(self) -> bool:
        """Whether this is the configuration of an adapter that was saved."""
        # The checksum is computed when masks are saved or combined. It is not an option, so it is not set before.
        return self.mask_sha256 is not None

    def _apply_preset(self) -> None:
        """Fill in the preset's values of fields that were not given."""
        # A saved configuration has the values that it was trained with, also if the preset has changed since.
        if self.preset is None or self.is_saved:
            return
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            hint = did_you_mean(str(self.preset), PRESETS)
            raise UserError(f"preset is {self.preset!r}{hint}; choose one of: {', '.join(PRESETS)}")
        preset = PRESETS[self.preset]

        # Positional arguments have no name in `given`; one that matters differs from its default.
        given = set()
        for name in preset:
            if name in self.given or getattr(self, name) != _default(name):
                given.add(name)

        selection = preset["selection"]
        if "selection" in given:
            selection = self.selection

        # Another learner may be given beside the preset: options that it does not read are left out, because
        # `_check_effects` would raise for them.
        unread: set[str] = set()
        if selection in LEARNERS:  # a misspelt name is reported by `_check_choices`
            options = LEARNERS[selection].options
            unread = set(learner_options()) - set(options)
        if not is_free(selection):
            unread.add("init_value")

        for name, value in preset.items():
            if name not in given and name not in unread:
                # A copy, because the lists of a configuration may be changed: PEFT and its users extend them.
                setattr(self, name, copy.copy(value))

    def _normalize(self) -> None:
        """Give fields the types that PEFT reads and JSON has.

        Raises:
            UserError: If a field that chooses layers has a value of another type.
        """
        # numpy's numbers and fractions, which JSON cannot write; numpy's float64 is a float.
        for name in ("sparsity", *_NUMBERS, *_NUMBERS_OR_NONE):
            value: Any = getattr(self, name)
            is_real = isinstance(value, numbers.Real)
            if is_real and not isinstance(value, int | float):
                is_whole = isinstance(value, numbers.Integral)
                setattr(self, name, int(value) if is_whole else float(value))

        for name in _NAMES:
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            entries = list(value) if isinstance(value, Iterable) else [value]
            if not all(isinstance(entry, str) for entry in entries):
                raise UserError(f"{name} is {value!r}; give a list of names")
            # Lists, which PEFT extends for classifiers. Others are sorted: sets of strings have another order in each
            # process.
            if not isinstance(value, list):
                setattr(self, name, sorted(entries))
        # PEFT would take the letters of a string for names.
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        self._normalize_indices()

    def _normalize_indices(self) -> None:
        """Make ``layers_to_transform`` an int, or a list of ints, out of a range, a set or an array of numpy."""
        layers: Any = self.layers_to_transform
        if layers is None:
            return
        is_one = not isinstance(layers, Iterable)
        try:
            indices = [operator.index(index) for index in ([layers] if is_one else layers)]
        except TypeError:
            raise UserError(f"layers_to_transform is {layers!r}; give indices of layers, from 0") from None
        if is_one:
            self.layers_to_transform = indices[0]
        elif isinstance(layers, list):
            self.layers_to_transform = indices
        else:
            self.layers_to_transform = sorted(indices)

    def _check_choices(self) -> None:
        """Raise for a value that is not among the choices of its field."""
        # The choices of a Literal are in its annotation; those of a registry grow with `register_learner`. The string
        # annotations of `from __future__ import annotations` have to be evaluated, which get_type_hints does.
        choices_of: dict[str, tuple[str, ...]] = {}
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                choices_of[name] = get_args(kind)
        choices_of["selection"] = tuple(LEARNERS)
        choices_of["removed_value"] = tuple(REMOVED_VALUES)

        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                more = ""
                if name == "selection":
                    more = " (a learner of your own: register it in this process, see docs/learners.md)"
                raise UserError(f"{name} is {value!r}{hint}; choose one of: {', '.join(choices)}{more}")

        for name in LEARNERS[self.selection].options:
            if not hasattr(self, name):
                raise UserError(
                    f"the learner {self.selection!r} has the option {name!r}, which is no field of "
                    f"{type(self).__name__}: name fields that there are"
                )

    def _check_values(self) -> None:
        """Raise for values of another type than their field's, or outside of its range."""
        # Types first: PEFT builds configurations from JSON, where a number may have been written as a string.
        for name in (*_NUMBERS, *_NUMBERS_OR_NONE):
            value = getattr(self, name)
            if value is None and name in _NUMBERS_OR_NONE:
                continue
            # True is an int to Python.
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UserError(f"{name} is {value!r}; it must be a number")
        # Texts such as "no" would count as true.
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise UserError(f"{name} is {value!r}; it must be true or false")
        model = self.removed_value_model
        if model is not None and not isinstance(model, str):
            raise UserError(f"removed_value_model is {model!r}; it must be a folder or a name on the hub, as text")

        # Ranges. The comparisons are written so that NaN, for which each of them is False, raises.
        check_sparsity(self.sparsity)
        if not 0 < self.init_std < math.inf:
            raise UserError(f"init_std is {self.init_std!r}; it is a standard deviation and must be > 0")
        for name in ("threshold", "init_value"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be a finite number")
        if not 0 <= self.sparsity_ramp <= 1:
            raise UserError(f"sparsity_ramp is {self.sparsity_ramp}; it is a share of training and must be in [0, 1]")
        if not 0 <= self.price < math.inf:
            raise UserError(f"price is {self.price}; it must be 0 or more")
        for name in ("sharpness", "sharpness_end", "temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; it must be above 0")
        if self.progress is not None and not 0 <= self.progress <= 1:
            raise UserError(f"progress is {self.progress}; it is a share of training and must be in [0, 1]")
        seed = self.mask_seed
        is_whole = isinstance(seed, int) or seed.is_integer()
        if not is_whole or seed < 0:
            raise UserError(f"mask_seed is {seed}; it must be a whole number >= 0")
        # The streams of random numbers are named by it: 1.0 would be another name than 1.
        self.mask_seed = int(seed)

        # The published code's `sparsity` is the opposite of ours, so that a value above a half is likely to come from
        # there.
        is_mostly_removed = self.selection == "topk" and self.sparsity > 0.5
        if is_mostly_removed and not self.is_saved:
            warnings.warn(
                f"sparsity {self.sparsity} removes {self.sparsity:.0%} of the target weights. The authors' released "
                f"code calls the fraction that is KEPT sparsity; its {self.sparsity} is {1 - self.sparsity:g} here.",
                stacklevel=4,  # past __post_init__ and the generated __init__, to the caller of MaskConfig(...)
            )

    def _check_layers(self) -> None:
        """Raise for choices of layers that PEFT would read in another way than they look, or not at all."""
        # PEFT compiles a string for each module that it matches; the error would come late, without the field's name.
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"{name} {pattern!r} is not a regular expression: {error}") from None

        # PEFT reads layers_to_transform only for targets in a list, and layers_pattern only together with it.
        if self.layers_to_transform is None:
            if self.layers_pattern:
                raise UserError(
                    "layers_pattern has no effect without layers_to_transform: name layers, or leave it out"
                )
            return
        if self.layers_to_transform == []:
            raise UserError("layers_to_transform is empty, which PEFT takes for all layers; name one, or leave it out")
        is_expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_expression:
            raise UserError(
                f"layers_to_transform has no effect beside a regular expression in target_modules "
                f"({self.target_modules!r}): name the layers in the expression, or give a list of names"
            )

    def _check_effects(self) -> None:
        """Raise for fields that were given and would change nothing."""
        # Options of other learners. Compared with the defaults: an option that is given with its default is harmless.
        options_of_learner = LEARNERS[self.selection].options
        for name in learner_options():
            # A learner of a user may name what is no field here; `_check_choices` raises where it is taken.
            if name in options_of_learner or not hasattr(self, name):
                continue
            value = getattr(self, name)
            if value != _default(name):
                raise UserError(
                    f"{name}={value!r} has no effect with selection={self.selection!r}; it goes with {names_with(name)}"
                )

        # Straight through, with no price, the gradient has no slope in it. A preset's values do no harm, and are given
        # again where a configuration is read from its file.
        has_slope = self.selection != "logit" or self.gradient == "sigmoid" or self.price > 0
        for name in ("sharpness", "sharpness_end"):
            value = getattr(self, name)
            harmless = (_default(name), PRESETS.get(str(self.preset), {}).get(name))
            if value not in harmless and not has_slope:
                raise UserError(
                    f"{name}={value!r} has no effect with gradient={self.gradient!r} and price=0; it goes with "
                    "gradient='sigmoid', or with a price"
                )
        is_constant = self.init_scores == "constant" and self.init_value is not None
        if self.init_std != _default("init_std") and is_constant:
            raise UserError(
                f"init_std={self.init_std!r} has no effect with init_scores='constant' and an init_value; leave one "
                "of them out"
            )

        # An init_value of 0 passes: it is where the other learners start anyway.
        has_center = is_free(self.selection) or self.init_scores == "constant"
        if self.init_value and not has_center:
            raise UserError(
                f"init_value={self.init_value!r} has no effect with selection={self.selection!r} and "
                f"init_scores={self.init_scores!r}; it goes with {names_with('price')}, and with init_scores='constant'"
            )

    def _check_combinations(self) -> None:
        """Raise for settings that are valid by themselves, but together remove nothing, remove all, or never train."""
        cuts_magnitudes = self.selection == "threshold" and self.rank_by == "abs"
        if cuts_magnitudes and self.threshold <= 0:
            raise UserError(
                f"threshold is {self.threshold} and rank_by is 'abs': no magnitude is below it, so nothing would be "
                "removed; set rank_by='signed', or a threshold above 0"
            )
        # sign(0) = 0 is a factor of the gradient, see masking.score_gradient.
        starts_at_zero = self.init_scores == "constant" and self.start_value == 0
        if starts_at_zero and self.ranks_by == "abs":
            raise UserError(
                "init_scores='constant' with init_value=0 and rank_by='abs' never trains: the gradient is 0 at score 0;"
                " set init_value or rank_by='signed'"
            )

        needs_model = self.removed_value == "base"
        has_model = self.removed_value_model is not None
        if needs_model != has_model:
            raise UserError(
                f"removed_value is {self.removed_value!r} and removed_value_model {self.removed_value_model!r}; "
                "removed_value='base' needs the model before fine-tuning, and nothing else does"
            )

        # A learner that cuts at 0, and all scores of which start at 0 or below.
        if is_free(self.selection):
            # How far the highest score lies above the center, in standard deviations: of a normal distribution hardly
            # any draw is beyond six, and scores spread by rank are uniform, on center +- sqrt(3) deviations.
            if self.init_scores == "constant":
                num_deviations = 0.0
            elif self.init_scores == "normal":
                num_deviations = 6.0
            else:
                num_deviations = math.sqrt(3)
            highest_score = self.start_value + num_deviations * self.init_std
            if highest_score <= 0:
                raise UserError(
                    f"selection={self.selection!r} removes scores of 0 and less, and with "
                    f"init_scores={self.init_scores!r} and init_value={self.start_value} that is every weight; set "
                    "init_value above 0"
                )


def _default(name: str) -> Any:
    """Default of a field of MaskConfig."""
    return MaskConfig.__dataclass_fields__[name].default
