"""A mask's settings as other trainers give them: a mapping, a JSON text, or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from maskft_base.errors import UserError, did_you_mean

from ..tuner import MaskConfig
from ..tuner.learners import depends_on_progress


def config_of(given: Any, where: str, **defaults: Any) -> MaskConfig:
    """The configuration that ``given`` describes; scores are saved, so that the host can resume.

    Args:
        given: Fields of MaskConfig, as a mapping or as JSON; None or empty: the defaults.
        where: What it is called there, for errors.
        **defaults: Values of fields that are not given; None is left out.

    Raises:
        UserError: If it is neither, or names a field that a mask does not have.
    """
    try:
        values = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {given!r}; give settings of MaskConfig, such as {{'sparsity': 0.1}}")
    known = [spec.name for spec in fields(MaskConfig) if spec.init]
    for name in values:
        if name not in known:
            raise UserError(f"{where} has no setting {name!r}{did_you_mean(name, known)}")
    defaults = {name: value for name, value in defaults.items() if value is not None}
    return MaskConfig(**{"task_type": "CAUSAL_LM", "save_scores": True, **defaults, **values})


def refuse_quantised(model: Any) -> None:
    """Let weights of floats and of bitsandbytes pass, however the host was told to load them.

    Raises:
        UserError: If the model is quantised in another way.
    """
    method = getattr(model, "quantization_method", None)
    if method not in (None, "bitsandbytes"):
        name = getattr(method, "value", method)
        raise UserError(f"the base is quantised by {name}; a mask needs weights of floats or bitsandbytes, load it so")


def moving_settings(config: MaskConfig) -> str:
    """The settings by which a mask depends on how far training is, for errors; empty if it does not."""
    if not depends_on_progress(config):
        return ""
    plain = MaskConfig()
    values = {name: getattr(config, name) for name in ("selection", "sparsity_ramp", "sharpness_end")}
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value != getattr(plain, name))
