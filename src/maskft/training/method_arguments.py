"""Options of ``maskft train`` beside TRL's: the method, and the mask's settings with the prefix ``mask_``."""

# ruff: noqa: RUF009 -- an option is a dataclasses.field

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, make_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from maskft_common.command_line import with_default
from maskft_common.errors import UserError
from maskft_common.files import expand_user, is_there, parse_json, read_json
from maskft_common.layout import ADAPTER_OPTIONS

from ..baselines.fixed import FIXED_MASKS
from ..data.arguments import option
from ..masking import ScoreStart
from ..tuner.config import MaskConfig
from ..tuner.presets import PRESETS

# PEFT's name of an adapter; every run has at most one.
ADAPTER = "default"

FIXED_MASK_METHODS = tuple(FIXED_MASKS)
MASK_METHODS = ("mask", *FIXED_MASK_METHODS)
# A fine-tuned model with the model before, not trained.
INTERPOLATE = "interpolate"
# Of the fine-tuned model; held-out rows choose one.
SHARES = tuple(n / 10 for n in range(1, 11))
UNTRAINED_METHODS = (*FIXED_MASK_METHODS, INTERPOLATE)
# An adapter of PEFT's, configured by peft_config.
PEFT = "peft"
METHODS = ("full", PEFT, *MASK_METHODS, INTERPOLATE)

# Fields a preset may set; their default is None, "not given on the command line".
_DECIDED: dict[str, None] = {}
for _preset in PRESETS.values():
    _DECIDED.update(dict.fromkeys(_preset))
_SPECS = {spec.name: spec for spec in fields(MaskConfig)}
_SETTINGS = [name for name, spec in _SPECS.items() if spec.metadata.get("is_option")]
# The name of a layer. A single entry that is not one is a regular expression, or PEFT's "all-linear".
_NAME = re.compile(r"(?!all-linear$)[\w.-]+")


def _argument(name: str) -> str:
    """Name of the option of a field of MaskConfig; ``mask_seed`` has the prefix already."""
    return f"mask_{name.removeprefix('mask_')}"


def _kind(hint: Any) -> Any:
    """The type of an option for TrlParser: the list of a union, and text for a choice, which MaskConfig checks."""
    if get_origin(hint) is UnionType:
        parts = [part for part in get_args(hint) if part is not NoneType]
        lists = [part for part in parts if get_origin(part) is list]
        # A list, if there is one: on the command line a single value is a list of one.
        hint = lists[0] if lists else parts[0]
    if get_origin(hint) is Literal:
        return str
    return hint


def _mask_argument(name: str, hint: Any) -> tuple[str, Any, Any]:
    """The option of a field of MaskConfig, as ``make_dataclass`` takes it: name, type, field."""
    spec = _SPECS[name]
    option_name = _argument(name)
    default = None if name in _DECIDED else spec.default
    kind = _kind(hint)
    if default is None:
        kind = kind | None

    # argparse formats help with %.
    text = spec.metadata["help"].replace("%", "%%")
    default_in_words = _SHOWN.get(name, UNSAID.get(option_name))
    if default_in_words is not None:
        text = with_default(text, default_in_words)
    return option_name, kind, option(default, text)


# Defaults without a preset, except those of the recommended preset.
UNSAID: dict[str, Any] = {}
for _name in _DECIDED:
    if _name not in ("sparsity", "init_scores"):
        UNSAID[_argument(_name)] = _SPECS[_name].default
# The recommended ones, in words for the help; see default_start.
_SHOWN = {
    "sparsity": PRESETS["recommended"]["sparsity"],
    "init_scores": "magnitude for top-k masks that remove to zero, else normal",
}
_HINTS = get_type_hints(MaskConfig)
# Made from MaskConfig, so that every option has its help, default and type in one place.
_MASK_ARGUMENTS = [_mask_argument(name, _HINTS[name]) for name in _SETTINGS]
MaskArguments = make_dataclass("MaskArguments", _MASK_ARGUMENTS)
MaskArguments.__doc__ = "Settings of the mask; each is the field of MaskConfig without the prefix."


@dataclass
class MethodArguments:
    """The method and its settings."""

    method: str = option(
        "mask",
        "full: all weights; peft: the adapter that peft_config describes (LoRA, IA3, OFT, ...); mask: a learned mask; "
        "random_mask, l1_mask, wanda_mask: fixed masks of the same size, not trained; interpolate: the model mixed "
        "with before_model, not trained.",
        choices=list(METHODS),
    )
    peft_config: dict | str | None = option(
        None,
        "With --method peft: an adapter_config.json of PEFT's, or its content as JSON: peft_type, and any "
        "option of PEFT's configuration of that type.",
    )
    gguf_file: str | None = option(
        None,
        "Train over this GGUF file in the folder (or on the hub) that model_name_or_path names; tokenizer and chat "
        "template are the file's. A mask trained so merges into it without rounding: maskft merge --gguf.",
    )
    match_adapter: str | None = option(
        None,
        "With a fixed mask: remove from each matrix as many weights as the mask in this adapter "
        "folder does (default: mask_sparsity of each)",
    )
    num_candidates: int = option(
        1,
        "With random_mask: draw this many masks, with the seeds mask_seed, mask_seed + 1, ..., and keep "
        "the one with the lowest held-out loss; at least 1.",
    )
    num_calibration_samples: int = option(
        128,
        "With fixed masks that look at rows (wanda_mask) and mask_init_scores wanda: number of calibration rows, at "
        "least 1.",
    )
    before_model: str | None = option(None, "With interpolate: the model that model_name_or_path was fine-tuned from.")
    partial_layers: list[int] | None = option(
        None, "With --method full: train only the linear weights of these decoder layers (a control) (default: all)"
    )
    partial_target_modules: list[str] | None = option(
        None,
        "With --method full: train only the weights of linear layers with these names, such as gate_proj: those that a "
        "mask with these mask_target_modules covers (a control) (default: all)",
    )
    keep_mask: str | None = option(
        None,
        "With --method full: train the weights that the mask in this adapter folder keeps; those it "
        "removes stay at zero. The model is the one the mask was made for.",
    )
    start_mask: str | None = option(
        None,
        "With --method full or peft: set the weights that the mask in this adapter folder removes to zero, then train "
        "all weights (dense, sparse, dense) or an adapter, which is merged at the end.",
    )
    keep_worse: bool = option(
        False,
        "Write the mask also when it is not better than no mask on the held-out rows. Without it, an adapter "
        "that removes nothing is written instead.",
    )
    keep_last: bool = option(False, "Also save the model of the last step, in the folder `last` of output_dir.")

    def __post_init__(self) -> None:
        self.peft_config = read_peft_config(self.peft_config)
        # A shell leaves the ~ of --keep_mask=~/mask as it is.
        for name in ADAPTER_OPTIONS:
            folder = getattr(self, name)
            if isinstance(folder, str):
                setattr(self, name, os.path.expanduser(folder))
        if isinstance(self.partial_layers, int):
            # YAML may have one value for a list of one.
            self.partial_layers = [self.partial_layers]
        if isinstance(self.partial_target_modules, str):
            self.partial_target_modules = [self.partial_target_modules]


def read_peft_config(given: dict | str | None) -> dict[str, Any] | None:
    """The content of ``peft_config``.

    Args:
        given: The content, as a dict or as JSON, or the path of a file with it.

    Raises:
        UserError: If it is none of these.
    """
    if given is None or isinstance(given, dict):
        return given

    content = None
    is_text = isinstance(given, str)  # in a recipe it may be a number or a list
    if is_text and given.lstrip().startswith("{"):
        # Malformed JSON gets the message below.
        with suppress(ValueError):
            content = parse_json(given)
    elif is_text and is_there(given):
        content = read_json(expand_user(given))
    if not isinstance(content, dict):
        raise UserError(
            f'peft_config {given!r} is neither a JSON object such as {{"peft_type": "LORA"}} nor a file with one'
        )
    return content


def method_label(method: str, options: Mapping[str, Any]) -> str:
    """A method's name in results; for an adapter of PEFT's its type, such as ``lora``."""
    if method != PEFT:
        return method
    content = options.get("peft_config") or {}
    return str(content.get("peft_type", method)).lower()


def selection_of(options: Mapping[str, Any]) -> str:
    """The learner of a mask, by its option or its preset."""
    preset = PRESETS.get(str(options.get("mask_preset")), {})
    return options.get("mask_selection") or preset.get("selection", "topk")


def removes_a_share(options: Mapping[str, Any]) -> bool:
    """Whether the mask removes a given share of the weights (top-k)."""
    return selection_of(options) == "topk"


def default_start(options: Mapping[str, Any]) -> ScoreStart:
    """Initialisation of the scores if ``mask_init_scores`` is not given: the preset's, or the recommended one.

    Args:
        options: The mask's options, such as ``mask_preset``; missing ones have their defaults.
    """
    if options.get("mask_preset"):
        preset = PRESETS.get(str(options["mask_preset"]), {})
        return preset.get("init_scores", "normal")

    # The recommended order of magnitudes needs a rank, and small weights that may go to zero. A difference mask undoes
    # changes of weights, and a small weight may have changed much.
    removes_to_zero = options.get("mask_removed_value", "zero") == "zero"
    if removes_a_share(options) and removes_to_zero:
        return PRESETS["recommended"]["init_scores"]
    return "normal"


def mask_config(arguments: MaskArguments, **overrides) -> MaskConfig:
    """Build the tuner's configuration from flat arguments.

    Args:
        arguments: The options; None leaves a field to the preset, or to its default.
        **overrides: Fields of MaskConfig that win over the options.
    """
    # Without a preset, the recommended sparsity and start.
    values: dict[str, Any] = {}
    if not arguments.mask_preset:
        values["sparsity"] = PRESETS["recommended"]["sparsity"]
        values["init_scores"] = default_start(vars(arguments))
    # Given options win.
    for name in _SETTINGS:
        value = getattr(arguments, _argument(name))
        if value is not None:
            values[name] = value

    # PEFT takes a list for names and a string for a regular expression. The command line gives lists, and YAML may have
    # a string for one name.
    for name in ("target_modules", "exclude_modules"):
        names = values.get(name)
        if isinstance(names, list) and len(names) == 1 and not _NAME.fullmatch(names[0]):
            values[name] = names[0]
        elif isinstance(names, str) and _NAME.fullmatch(names):
            values[name] = [names]
    values.update(overrides)
    return MaskConfig(task_type="CAUSAL_LM", **values)
