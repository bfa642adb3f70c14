"""Configuration of a mask adapter: what is masked, how scores are ranked, where they start."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args, get_origin, get_type_hints

from peft.config import PeftConfig

from ..errors import UserError, did_you_mean
from ..masking import RankBy, ScoreStart, check_sparsity
from .codec import FORMAT_VERSION

# "we set ... masking ratio [to] 10%" (Sec. 3.2); the start and the ranking by magnitude are the published code's.
PRESETS = {
    "paper": {
        "selection": "topk",
        "scope": "matrix",
        "rank_by": "abs",
        "init_scores": "normal",
        "init_std": 0.02,
        "sparsity": 0.1,
    }
}


class MaskPeftType(str, Enum):  # noqa: UP042 - PEFT's own PeftType is (str, Enum), and code compares the two
    """PEFT's enum of methods is closed; a str enum of our own has the ``.value`` that transformers reads."""

    MASK = "MASK"


NO_TOKEN_INDICES = "trainable_token_indices is not supported by masks; use modules_to_save=['embed_tokens']"


@dataclass
class MaskConfig(PeftConfig):
    """Mask Fine-Tuning (https://arxiv.org/abs/2503.22764) as a PEFT method.

    ``get_peft_model(model, MaskConfig(...))`` freezes every weight and gives each weight of the chosen linear layers a
    trainable float32 score, ``...mask_scores.<adapter>``. The defaults are the paper's setting.

    Raises:
        UserError: If a value is outside its range or two settings contradict each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regular expression) of the linear layers to mask, matched as PEFT matches them. "
            "Default: every linear layer inside the decoder layers."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of layers not to mask."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to mask, from 0. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of decoder layers, if it cannot be inferred, e.g. `h`."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved in full beside the mask."}
    )
    sparsity: float = field(
        default=0.1, metadata={"help": "Fraction of the target weights to REMOVE, in [0, 1). 0.1 removes 10 %."}
    )
    selection: Literal["topk", "threshold"] = field(
        default="topk",
        metadata={"help": "`topk` removes exactly `sparsity`; `threshold` removes scores below `threshold`."},
    )
    threshold: float = field(
        default=-0.035, metadata={"help": "Scores below it are removed when `selection` is `threshold`."}
    )
    scope: Literal["matrix", "global"] = field(
        default="matrix",
        metadata={"help": "`matrix` removes `sparsity` of each matrix; `global` of all of them taken as one pool."},
    )
    rank_by: RankBy = field(
        default="abs", metadata={"help": "`abs` ranks by the magnitude of a score (as published), `signed` by value."}
    )
    init_scores: ScoreStart = field(
        default="normal", metadata={"help": "Start of the scores: normal, kaiming_uniform, constant or magnitude."}
    )
    init_std: float = field(
        default=0.02, metadata={"help": "Standard deviation of the `normal` and `magnitude` starts, > 0."}
    )
    init_value: float = field(default=0.0, metadata={"help": "Value of the `constant` start."})
    mask_seed: int = field(default=0, metadata={"help": "Seed of the score initialisation, >= 0."})
    preset: str | None = field(
        default=None, metadata={"help": "`paper`: topk, matrix, abs, normal(0, 0.02), sparsity 0.1."}
    )
    save_scores: bool = field(
        default=False,
        metadata={
            "help": "Also write the float32 scores into the adapter file (4 bytes per weight). Needed to resume "
            "training from a checkpoint; not needed to use the mask."
        },
    )
    verify_base: bool = field(
        default=True, metadata={"help": "Refuse to load onto base weights other than those it was trained on."}
    )
    # Filled in when an adapter is saved.
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter file."})
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "sha256 of the masked base weights, rounded to bfloat16."}
    )
    mask_sha256: str | None = field(default=None, metadata={"help": "sha256 over the masks of all modules."})
    recipe: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the mask was trained, for people to read."}
    )
    # TRL reads this field of every PEFT config.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Not supported by masks; present because TRL reads it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MaskPeftType.MASK
        if self.format_version > FORMAT_VERSION:
            raise UserError(
                f"the adapter has format version {self.format_version}, this maskft reads up to {FORMAT_VERSION}; "
                "upgrade: pip install -U maskft"
            )
        self._apply_preset()
        for name, kind in get_type_hints(type(self)).items():
            choices, value = get_args(kind), getattr(self, name)
            if get_origin(kind) is Literal and value not in choices:
                raise UserError(
                    f"{name} is {value!r}{did_you_mean(str(value), choices)}; choose one of: {', '.join(choices)}"
                )
        check_sparsity(self.sparsity)
        if self.selection == "threshold" and self.scope == "global":
            raise UserError("scope='global' has no effect with selection='threshold': one threshold is global already")
        if self.selection == "threshold" and self.rank_by == "abs" and self.threshold <= 0:
            raise UserError(
                f"threshold is {self.threshold} and rank_by is 'abs': no magnitude is below it, so nothing would be "
                "removed; set rank_by='signed', or a threshold above 0"
            )
        if not self.init_std > 0:
            raise UserError(f"init_std is {self.init_std!r}; it is a standard deviation and must be > 0")
        layers = self.layers_to_transform
        if layers is not None and min([layers] if isinstance(layers, int) else [*layers, 0]) < 0:
            raise UserError(f"layers_to_transform is {layers}; layers are counted from 0")
        if self.mask_seed < 0:
            raise UserError(f"mask_seed is {self.mask_seed}; it must be >= 0")
        if self.init_scores == "constant" and self.rank_by == "abs" and self.init_value == 0:
            raise UserError(
                "init_scores='constant' with init_value=0 and rank_by='abs' never trains: the gradient is 0 at score 0;"
                " set init_value or rank_by='signed'"
            )
        if self.trainable_token_indices is not None:
            raise UserError(NO_TOKEN_INDICES)
        if isinstance(self.target_modules, tuple | set):
            self.target_modules = sorted(self.target_modules)
        if self.selection == "topk" and self.sparsity > 0.5:
            warnings.warn(
                f"sparsity {self.sparsity} removes {self.sparsity:.0%} of the target weights. The authors' released "
                f"code calls the fraction that is KEPT sparsity; its {self.sparsity} is {1 - self.sparsity:g} here.",
                stacklevel=3,
            )

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        if self.preset not in PRESETS:
            raise UserError(
                f"preset is {self.preset!r}{did_you_mean(self.preset, PRESETS)}; choose one of: {', '.join(PRESETS)}"
            )
        for name, value in PRESETS[self.preset].items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, value):
                raise UserError(
                    f"preset {self.preset!r} sets {name}={value!r}, but {name}={getattr(self, name)!r} was given; "
                    "drop one"
                )
            setattr(self, name, value)
