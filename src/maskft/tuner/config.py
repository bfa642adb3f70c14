"""Configuration of a mask adapter: what is masked, how scores are ranked, where they start."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from peft.config import PeftConfig
from peft.utils import WEIGHTS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from maskft_common.errors import UserError, did_you_mean
from maskft_common.files import from_anywhere
from maskft_common.layout import ADAPTER_WEIGHTS

from ..masking import RankBy, ScoreStart, check_sparsity
from ..masks.adapter_file import ScoresOfSave, add_tensors, weights_beside_masks
from ..masks.card import write_card
from ..masks.codec import FORMAT_VERSION, weights_sha256
from .learners import LEARNERS, is_free, learner_options, names_with

# "we set ... masking ratio [to] 10%" (Sec. 3.2); the start and the ranking by magnitude are the published code's.
_PUBLISHED = {"selection": "topk", "rank_by": "abs", "init_std": 0.02, "sparsity": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_PUBLISHED, "init_scores": "normal"},
    # A starting point, on all layers and at learning rate 3e-4: docs/learners.md.
    "recommended": {**_PUBLISHED, "init_scores": "magnitude"},
    # After Deletion Tuning (https://arxiv.org/abs/2611.10866), of which only the abstract was read: the start (Wanda's
    # order learned less) and the constants are ours. Without the price a hundred times as many weights go.
    "deletion_tuning": {
        "target_modules": ["gate_proj"],
        "selection": "logit",
        "gradient": "sigmoid",
        "init_scores": "magnitude",
        "init_std": 0.02,
        "init_value": 0.04,
        "price": 1.0,
        "sharpness": 10.0,
        "sharpness_end": 100.0,
    },
}

_CHECKPOINT = re.compile(rf"(^|/){PREFIX_CHECKPOINT_DIR}-\d+(/|$)")  # the folders that transformers' Trainer writes
DATA_STARTS = ("wanda",)  # known when training rows have been seen


class MaskPeftType(str, Enum):  # noqa: UP042 - PEFT's own PeftType is (str, Enum), and code compares the two
    """PEFT's enum of methods is closed; a str enum of our own has the ``.value`` that transformers reads."""

    MASK = "MASK"


NO_TOKEN_INDICES = (
    "trainable_token_indices is not supported by masks: train new tokens with the weights, before the mask (or, where "
    "input and output embeddings are not tied, with modules_to_save=['embed_tokens'])"
)


def _option(default: Any, text: str) -> Any:
    """A field with the text that helps on it, here and on the command line."""
    return field(default=default, metadata={"help": text})


@dataclass
class MaskConfig(PeftConfig):
    """Mask Fine-Tuning (https://arxiv.org/abs/2503.22764) as a PEFT method.

    ``get_peft_model(model, MaskConfig(...))`` freezes every weight and gives each weight of the chosen linear layers a
    trainable float32 score, ``...mask_scores.<adapter>``. The defaults are the paper's setting.

    Raises:
        UserError: If a value is outside its range or two settings contradict each other.
    """

    target_modules: list[str] | str | None = _option(
        None,
        "Names (or a regular expression) of the linear layers to mask, matched as PEFT matches them. "
        "Default: every linear layer inside the decoder layers.",
    )
    exclude_modules: list[str] | str | None = _option(None, "Names (or a regular expression) of layers not to mask.")
    layers_to_transform: list[int] | int | None = _option(
        None, "Indices of the decoder layers to mask, from 0; not with a regular expression. Default: all."
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Name of the list of decoder layers, if it cannot be inferred, e.g. `h`."
    )
    modules_to_save: list[str] | None = _option(None, "Modules trained and saved in full beside the mask.")
    sparsity: float = _option(0.1, "Fraction of the target weights to REMOVE, in [0, 1). 0.1 removes 10 %.")
    sparsity_ramp: float = _option(
        0.0,
        "With `topk`: share of training, in [0, 1], over which the fraction removed grows from 0 to "
        "`sparsity`, along a cubic; 0: it is `sparsity` from the start.",
    )
    selection: str = _option(
        "topk",
        "`topk` removes exactly `sparsity`; `threshold` removes scores below `threshold`; `logit`, "
        "`gumbel` (sigmoid with noise) and `hard_concrete` (noise, stretched and clipped) remove scores of 0 and "
        "less, as many as there are; noise is drawn in training only.",
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
        None, "`sharpness` at the end of training, reached linearly. Default: as at the start."
    )
    temperature: float = _option(4.0, "With `gumbel`: temperature at the start, > 0.")
    temperature_end: float = _option(0.05, "With `gumbel`: temperature at the end of training, reached linearly, > 0.")
    removed_value: Literal["zero", "base"] = _option(
        "zero", "What a removed weight becomes: `zero`, or its value in `removed_value_model`."
    )
    removed_value_model: str | None = _option(
        None, "With `removed_value` `base`: the model before fine-tuning, a folder or a hub name."
    )
    threshold: float = _option(-0.035, "Scores below it are removed when `selection` is `threshold`.")
    rank_by: RankBy = _option("abs", "`abs` ranks by the magnitude of a score (as published), `signed` by value.")
    init_scores: ScoreStart = _option(
        "normal",
        "Initialization of the scores: normal, constant, or ordered by magnitude or by wanda (magnitude * norm of the "
        "input, which needs training rows).",
    )
    init_std: float = _option(0.02, "Standard deviation of the `normal` start and of those by an order, > 0.")
    init_value: float | None = _option(
        None,
        "Value of the `constant` start; with `logit`, `gumbel` and `hard_concrete` the centre of any start "
        "[0, and there what keeps nearly all weights: 2 * init_std, with `gumbel` 3 / sharpness and with "
        "`hard_concrete` 3 where that is more].",
    )
    mask_seed: int = _option(0, "Seed of the score initialisation, >= 0.")
    preset: str | None = _option(
        None,
        "`paper`: topk, abs, normal(0, 0.02), sparsity 0.1. `recommended`: the same from the "
        "smallest weights on, meant for all layers and learning rate 3e-4. `deletion_tuning`: logits of all "
        "gate_proj from the smallest weights on, sigmoid slope, price 1, sharpness 10 to 100, meant for models that "
        "were not fine-tuned and learning rate 5e-3 (after Deletion Tuning; start and constants are ours).",
    )
    save_scores: bool = _option(
        False,
        "Also write the float32 scores into the adapter file (4 bytes per weight): to train it further. "
        "Folders named checkpoint-N hold them always; using the mask does not need them.",
    )
    verify_base: bool = _option(True, "Refuse to load onto base weights other than those it was trained on.")
    # Filled in when an adapter is saved.
    scope: str = _option("matrix", "Of earlier versions: `matrix`, or `global`, one pool.")
    format_version: int = _option(FORMAT_VERSION, "Version of the adapter file.")
    base_fingerprint: str | None = _option(None, "sha256 of the masked base weights, rounded to bfloat16.")
    base_quantisation: str | None = _option(None, "Of earlier versions, which masked quantised weights too.")
    removed_value_fingerprint: str | None = _option(None, "sha256 of the same weights in `removed_value_model`.")
    progress: float | None = _option(None, "Share of training done, in [0, 1], see `set_mask_progress`.")
    mask_sha256: str | None = _option(None, "sha256 over the masks of all modules.")
    weights_sha256: dict[str, str] | None = _option(
        None, "sha256 of each tensor beside the masks: modules_to_save and resized embeddings."
    )
    recipe: dict[str, Any] | None = _option(None, "How the mask was trained, for people to read.")
    # TRL reads this field of every PEFT config.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        None, "Not supported by masks; present because TRL reads it."
    )

    # Whether no weights were loaded or saved since an adapter of this configuration was made: its checksums are then
    # those of the file that comes next. Without an annotation it is no field, so it is not saved.
    is_new = False
    # Name of the adapter that this one is a frozen copy of, such as the reference of preference training; "": of none.
    copy_of = ""
    asked_for = frozenset[str]()
    # Left by the tuner for save_pretrained, which alone knows the folder.
    scores_of_save = ScoresOfSave()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the names of what was given: a default that was asked for wins over a preset, another does not."""
        config = super().__new__(cls)
        config.asked_for = frozenset(kwargs)
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MaskPeftType.MASK
        if self.format_version > FORMAT_VERSION:
            raise UserError(
                f"the adapter has format version {self.format_version}, this maskft reads up to {FORMAT_VERSION}; "
                "use a newer one"
            )
        self._apply_preset()
        self._check_choices()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"{name} {pattern!r} is no regular expression: {error}") from None
        for name in ("init_std", "sparsity_ramp", "price", "mask_seed", "threshold", "sharpness", "temperature"):
            if not isinstance(value := getattr(self, name), int | float):
                raise UserError(f"{name} is {value!r}; it must be a number")
        check_sparsity(self.sparsity)
        if not 0 < self.init_std < math.inf:
            raise UserError(f"init_std is {self.init_std!r}; it is a standard deviation and must be > 0")
        for name in ("threshold", "init_value"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError(f"{name} is {getattr(self, name)}; it must be a finite number")
        self._check_learner()
        if self.scope != "matrix" and self.mask_sha256 is None:
            raise UserError(f"scope is {self.scope!r}; scores are ranked per matrix: leave it out, or take 'threshold'")
        if self.selection == "threshold" and self.rank_by == "abs" and self.threshold <= 0:
            raise UserError(
                f"threshold is {self.threshold} and rank_by is 'abs': no magnitude is below it, so nothing would be "
                "removed; set rank_by='signed', or a threshold above 0"
            )
        layers = self.layers_to_transform
        layers = self.layers_to_transform = [*layers] if isinstance(layers, range | tuple) else layers  # for JSON
        if layers is None and self.layers_pattern:
            raise UserError("layers_pattern has no effect without layers_to_transform: name layers, or leave it out")
        if layers == []:
            raise UserError("layers_to_transform is empty, which PEFT takes for all layers; name one, or leave it out")
        if layers is not None and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise UserError(
                f"layers_to_transform has no effect beside a regular expression in target_modules "
                f"({self.target_modules!r}): name the layers in the expression, or give a list of names"
            )
        if self.mask_seed < 0:
            raise UserError(f"mask_seed is {self.mask_seed}; it must be >= 0")
        if self.init_scores == "constant" and self.ranks_by == "abs" and self.start_value == 0:
            raise UserError(
                "init_scores='constant' with init_value=0 and rank_by='abs' never trains: the gradient is 0 at score 0;"
                " set init_value or rank_by='signed'"
            )
        if isinstance(self.target_modules, tuple | set):
            self.target_modules = sorted(self.target_modules)
        if isinstance(self.modules_to_save, str):  # whose letters PEFT would take for names
            self.modules_to_save = [self.modules_to_save]
        if self.selection == "topk" and self.sparsity > 0.5 and self.mask_sha256 is None:  # not of one that is loaded
            warnings.warn(
                f"sparsity {self.sparsity} removes {self.sparsity:.0%} of the target weights. The authors' released "
                f"code calls the fraction that is KEPT sparsity; its {self.sparsity} is {1 - self.sparsity:g} here.",
                stacklevel=3,
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, with the checksums of what PEFT has written beside the masks.

        In a Trainer's checkpoint folder the scores join them, so that any trainer resumes where it was.
        """
        for name in ("base_model_name_or_path", "removed_value_model"):
            if model := getattr(self, name):
                setattr(self, name, from_anywhere(model))
        file = Path(save_directory) / ADAPTER_WEIGHTS
        scores, self.scores_of_save = self.scores_of_save, ScoresOfSave()
        if (file.parent / WEIGHTS_NAME).is_file():
            if not file.is_file():  # PEFT has just written it
                (file.parent / WEIGHTS_NAME).unlink()
            self.inference_mode = False  # PEFT's saving sets it meanwhile
            raise UserError(
                f"masks are saved as safetensors, and {save_directory} has a {WEIGHTS_NAME}: remove it, or leave out "
                "safe_serialization=False"
            )
        if file.is_file():
            if scores and _CHECKPOINT.search(Path(save_directory).as_posix()):
                add_tensors(file, scores)
            self.weights_sha256 = weights_sha256(weights_beside_masks(file)) or None
        super().save_pretrained(save_directory, **kwargs)
        if file.is_file():
            write_card(save_directory, self)  # over PEFT's, whose lines do not load a mask

    @property
    def ranks_by(self) -> RankBy:
        """What is looked at of a score: its magnitude, or its value (always, where it is cut at 0)."""
        return "signed" if is_free(self.selection) else self.rank_by

    @property
    def start_value(self) -> float:
        """``init_value``, or where it is not given and scores are cut at 0 one that keeps nearly all weights.

        At two deviations 97.7 % of a normal start are kept and all of one by an order. Gates that began at 0, half of
        them shut, did not come back (docs/LOG.md).
        """
        if self.init_value is not None:
            return self.init_value
        start = LEARNERS[self.selection].start
        return 0.0 if start is None else max(2 * self.init_std, start(self))

    @property
    def beside_preset(self) -> dict[str, Any]:
        """Fields that are not as ``preset`` says, because they were given beside it."""
        preset = PRESETS.get(str(self.preset), {})
        return {name: getattr(self, name) for name, value in preset.items() if getattr(self, name) != value}

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        named = {name: get_args(kind) for name, kind in hints.items() if get_origin(kind) is Literal}
        for name, choices in {**named, "selection": tuple(LEARNERS)}.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"{name} is {value!r}{did_you_mean(str(value), choices)}; choose one of: {', '.join(choices)}"
                )

    def _check_effects(self) -> None:
        """Refuse what would change nothing."""
        options = learner_options()
        given = {name: getattr(self, name) for name in (*options, "init_value")}
        given = {name: value for name, value in given.items() if value != _default(name)}
        for name in given:
            if name in options and name not in LEARNERS[self.selection].options:
                raise UserError(
                    f"{name}={given[name]!r} has no effect with selection={self.selection!r}; it goes with "
                    f"{names_with(name)}"
                )
        if given.get("init_value") and not is_free(self.selection) and self.init_scores != "constant":
            raise UserError(
                f"init_value={self.init_value!r} has no effect with selection={self.selection!r} and "
                f"init_scores={self.init_scores!r}; it goes with {names_with('price')}, and with init_scores='constant'"
            )

    def _check_learner(self) -> None:
        if self.mask_sha256 is None:  # a saved adapter is what it says
            self._check_effects()
        if not 0 <= self.sparsity_ramp <= 1:
            raise UserError(f"sparsity_ramp is {self.sparsity_ramp}; it is a share of training and must be in [0, 1]")
        if not 0 <= self.price < math.inf:
            raise UserError(f"price is {self.price}; it must be 0 or more")
        for name in ("sharpness", "sharpness_end", "temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; it must be above 0")
        if (self.removed_value == "base") != (self.removed_value_model is not None):
            raise UserError(
                f"removed_value is {self.removed_value!r} and removed_value_model {self.removed_value_model!r}; "
                "removed_value='base' needs the model before fine-tuning, and nothing else does"
            )
        spread = {"constant": 0.0, "normal": 6.0}.get(self.init_scores, math.sqrt(3)) * self.init_std
        if is_free(self.selection) and self.start_value + spread <= 0:
            raise UserError(
                f"selection={self.selection!r} removes scores of 0 and less, and with init_scores={self.init_scores!r} "
                f"and init_value={self.start_value} that is every weight; set init_value above 0"
            )

    def _apply_preset(self) -> None:
        if self.preset is None or self.mask_sha256 is not None:  # a saved adapter is what it says
            return
        if self.preset not in PRESETS:
            raise UserError(
                f"preset is {self.preset!r}{did_you_mean(self.preset, PRESETS)}; choose one of: {', '.join(PRESETS)}"
            )
        preset = PRESETS[self.preset]
        given = {n for n in preset if n in self.asked_for or getattr(self, n) != _default(n)}
        selection = self.selection if "selection" in given else preset["selection"]
        others = {*learner_options()} - {*LEARNERS[selection].options} if selection in LEARNERS else set()
        others |= set() if is_free(selection) else {"init_value"}
        for name in preset.keys() - given - others:  # another learner was asked for: what it does not read is left out
            setattr(self, name, preset[name])


def _default(name: str) -> Any:
    return MaskConfig.__dataclass_fields__[name].default
