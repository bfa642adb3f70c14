"""Learners of masks: each an entry of :data:`LEARNERS`, made of short functions from scores to a gate and its slope.

    W_eff = R + (W - R) * gate(s)          gate 1 keeps a weight W, 0 puts its removed value R there (0, or the base's)
    dL/ds = dL/dW_eff * (W - R) * slope(s)

A hard gate is a bool mask, True = keep; its slope is chosen, the straight-through slope being 1. A soft gate is a
float32 tensor in [0, 1] with its own derivative as slope; it is used in training mode only. In evaluation, in the saved
file and in merging, every gate is hard. Docs: ``docs/learners.md``.

All tensors have the shape of the weight and are float32; s are the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskft_common.errors import UserError
from maskft_common.files import digest

if TYPE_CHECKING:
    from .config import MaskConfig as Settings  # what learners read of it


# Temperature and limits of the stretched gate: "gamma = -0.1, zeta = 1.1, beta = 2/3" (arXiv 1712.01312, Sec. 4).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


# The definitions


def sigmoid_slope(scores: Tensor, sharpness: float) -> Tensor:
    """Slope k * sigmoid'(k * s) of a logit learner, which trains the scores near 0 the most."""
    share = torch.mul(scores, sharpness).sigmoid_()
    return (1 - share).mul_(share.mul_(sharpness))


def gumbel_gate(scores: Tensor, noise: Tensor, sharpness: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Gate sigmoid((k * s + noise) / tau) and its slope: binary concrete, https://arxiv.org/abs/1611.00712.

    With a scale k and a falling tau, as MaskLLM uses its many-valued kind (https://arxiv.org/abs/2409.17481).
    """
    gate = torch.sigmoid((sharpness * scores + noise) / temperature)
    return gate, gate * (1 - gate) * (sharpness / temperature)


def hard_concrete_gate(scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Gate clip(sigmoid((s + noise) / beta) * (zeta - gamma) + gamma, 0, 1) and its slope, which is 0 where it clips.

    https://arxiv.org/abs/1712.01312, Eq. 10 and 11.
    """
    share = torch.sigmoid((scores + noise) / BETA)
    stretched = share * (ZETA - GAMMA) + GAMMA
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0, 1), share * (1 - share) * ((ZETA - GAMMA) / BETA) * inside


def hard_concrete_kept_slope(scores: Tensor) -> Tensor:
    """d/ds of the probability that a hard concrete gate is not 0, Eq. 12 of https://arxiv.org/abs/1712.01312."""
    return sigmoid_slope(scores - BETA * math.log(-GAMMA / ZETA), 1.0)


def cubic_ramp(progress: float, ramp: float) -> float:
    """Share of the final sparsity: 1 - (1 - t)^3 with t from 0 to 1 over the first ``ramp`` of training; 1 without one.

    https://arxiv.org/abs/1710.01878, Eq. 1, from sparsity 0.
    """
    return 1.0 if progress >= ramp else 1 - (1 - progress / ramp) ** 3


def logistic_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard logistic noise, the difference of two Gumbel variables."""
    uniform = torch.rand(shape, generator=generator, device=generator.device).clamp_(1e-7, 1 - 1e-7)
    return uniform.log() - torch.log1p(-uniform)


def blend_(out: Tensor, weight: Tensor, gate: Tensor, removed_value: Tensor | None = None) -> Tensor:
    """Write W_eff into ``out``; with a bool gate each entry is exactly W or R, +0 where ``removed_value`` is None."""
    if gate.dtype == torch.bool:
        if removed_value is None:
            return out.copy_(weight).masked_fill_(~gate, 0.0)
        return out.copy_(torch.where(gate, weight, removed_value))
    if removed_value is None:
        return out.copy_(weight * gate)
    return out.copy_(removed_value + (weight - removed_value) * gate)


# The registry


@dataclass(frozen=True)
class Learner:
    """What ``MaskConfig.selection`` names.

    Attributes:
        options: Fields of MaskConfig that it reads and not every learner does; others refuse them.
        cut: (config) -> what the ranking value of a kept weight is above; None: all but the share ``sparsity`` stay.
        start: Centre of fresh scores that keeps nearly all weights, where scores are cut at 0 and the share removed is
            free; None: scores are ranked or compared as they are.
        soft_gate: (config, scores, noise) -> gate and slope in training mode; None: the gate is hard there too.
        hard_slope: (config, scores) -> slope of the hard gate; None, or where it returns None: 1.
        kept_slope: (config, scores, slope of the hard gate, None: 1) -> d/ds of the relaxed number kept, which
            ``price`` multiplies.
    """

    options: tuple[str, ...]
    cut: Callable[[Settings], float] | None = None
    start: Callable[[Settings], float] | None = None
    soft_gate: Callable[[Settings, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    hard_slope: Callable[[Settings, Tensor], Tensor | None] | None = None
    kept_slope: Callable[[Settings, Tensor, Tensor | None], Tensor] | None = None


def _just_below_threshold(config: Settings) -> float:
    return torch.nextafter(torch.tensor(config.threshold), torch.tensor(-math.inf)).item()


def _logit_slope(config: Settings, scores: Tensor) -> Tensor | None:
    return sigmoid_slope(scores, _sharpness(config)) if config.gradient == "sigmoid" else None


def _kept_slope(config: Settings, scores: Tensor, slope: Tensor | None) -> Tensor:
    return sigmoid_slope(scores, _sharpness(config)) if slope is None else slope


def _gumbel_gate(config: Settings, scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    temperature = _scheduled(config, config.temperature, config.temperature_end)
    return gumbel_gate(scores, noise, _sharpness(config), temperature)


LEARNERS: dict[str, Learner] = {
    "topk": Learner(("sparsity", "sparsity_ramp")),
    "threshold": Learner(("threshold",), cut=_just_below_threshold),
    "logit": Learner(
        ("gradient", "price", "sharpness", "sharpness_end"),
        cut=lambda config: 0.0,
        start=lambda config: 0.0,
        hard_slope=_logit_slope,
        kept_slope=_kept_slope,
    ),
    "gumbel": Learner(
        ("price", "sharpness", "sharpness_end", "temperature", "temperature_end"),
        cut=lambda config: 0.0,
        start=lambda config: 3 / config.sharpness,  # open with probability 0.95
        soft_gate=_gumbel_gate,
        kept_slope=_kept_slope,
    ),
    "hard_concrete": Learner(
        ("price",),
        cut=lambda config: 0.0,
        start=lambda config: 3.0,  # not 0 with probability 0.99
        soft_gate=lambda config, scores, noise: hard_concrete_gate(scores, noise),
        kept_slope=lambda config, scores, slope: hard_concrete_kept_slope(scores),
    ),
}


def learner_options() -> list[str]:
    """Fields of MaskConfig that some learners read and others do not."""
    return list(dict.fromkeys(option for learner in LEARNERS.values() for option in learner.options))


def names_with(option: str) -> str:
    """The learners that read an option, for messages."""
    return " and ".join(name for name, learner in LEARNERS.items() if option in learner.options)


def is_free(selection: str) -> bool:
    """Whether scores are cut at 0, so that the share removed is free."""
    return selection in LEARNERS and LEARNERS[selection].start is not None


def has_soft_gate(config: Settings) -> bool:
    """Whether the gate is soft in training mode."""
    return LEARNERS[config.selection].soft_gate is not None


# Chosen by a configuration


def cut(config: Settings) -> float | None:
    """What ranking values (see ``MaskConfig.ranks_by``) must be above to be kept; None: their rank decides."""
    cut = LEARNERS[config.selection].cut
    return None if cut is None else cut(config)


def current_sparsity(config: Any) -> float:
    """Fraction that a top-k mask removes now, in [0, 1); of a configuration, or what is read of one."""
    return float(config.sparsity) * cubic_ramp(config.progress or 0.0, config.sparsity_ramp)


def soft_gate(config: Settings, scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and slope in training mode."""
    gate = LEARNERS[config.selection].soft_gate
    assert gate is not None
    return gate(config, scores, noise)


def hard_slope(config: Settings, scores: Tensor) -> Tensor | None:
    """Slope of a hard gate; None for 1."""
    slope = LEARNERS[config.selection].hard_slope
    return None if slope is None else slope(config, scores)


def price_gradient(config: Settings, scores: Tensor, numel: int, slope: Tensor | None = None) -> Tensor:
    """Derivative of price * share removed, at some scores of a matrix of ``numel``; ``slope``: of the hard gate."""
    kept_slope = LEARNERS[config.selection].kept_slope
    assert kept_slope is not None
    return kept_slope(config, scores, slope) * (-config.price / numel)


def draw_noise(config: Settings, module_name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Noise of one matrix, decided by the seed, the name and how far training is (and by the kind of device)."""
    return logistic_noise(shape, generator(device, config.mask_seed, module_name, repr(config.progress)))


def generator(device: torch.device | str, *stream: object) -> torch.Generator:
    """A generator of its own for each ``stream``, so that what is drawn in one layer does not move another."""
    seed = bytes.fromhex(digest("/".join(map(str, stream))))[:8]
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "little") >> 1)


def is_soft(config: Settings, is_training: bool) -> bool:
    """Whether a gate is soft now; that of a frozen copy is the mask that its original would be saved as."""
    return has_soft_gate(config) and is_training and not config.copy_of


def phase(config: Settings, is_training: bool) -> tuple[object, ...]:
    """What a gate depends on beside its scores."""
    size = (config.selection, config.sparsity, config.threshold)  # as an empty mask is made by, after training
    if not (has_soft_gate(config) or config.sparsity_ramp > 0 or config.sharpness_end is not None):
        return size
    is_training = is_training and not config.copy_of
    if is_training and config.progress is None:
        raise UserError(
            "this mask depends on how far training is: call maskft.set_mask_progress(model, step / max_steps) before "
            "every step (with transformers' Trainer: add_callback(maskft.MaskProgress()))"
        )
    return *size, config.progress, is_soft(config, is_training)


def _sharpness(config: Settings) -> float:
    return _scheduled(config, config.sharpness, config.sharpness_end)


def _scheduled(config: Settings, start: float, end: float | None) -> float:
    """A value that moves linearly from ``start`` to ``end`` over training."""
    return start if end is None else start + (end - start) * (config.progress or 0.0)
