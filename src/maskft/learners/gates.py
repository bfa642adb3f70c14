"""Learners with noise: in training their gate is soft and random, in evaluation it is hard and cuts scores at 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tuner.selection import (
    Learner,
    current_sharpness,
    logit_kept_slope,
    register_learner,
    scheduled,
    sigmoid_slope,
)

if TYPE_CHECKING:
    from ..tuner.config import MaskConfig

# Temperature and limits of the stretched gate, as in all experiments of https://arxiv.org/abs/1712.01312 (Sec. 4).
BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


def gumbel_gate(
    scores: Tensor,
    noise: Tensor,
    sharpness: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gate sigmoid((k * s + noise) / tau) and its slope: binary concrete, https://arxiv.org/abs/1611.00712.

    With a scale k and a falling tau, as MaskLLM uses its many-valued kind (https://arxiv.org/abs/2409.17481).

    Args:
        scores: Scores s, any shape.
        noise: Standard logistic noise, shape of ``scores``.
        sharpness: k, > 0.
        temperature: tau, > 0.
    """
    # A low temperature pushes the gate towards 0 and 1. At any temperature it is above 1/2 with probability
    # sigmoid(k * s), which `price` counts as the share kept (logit_kept_slope).
    gate = torch.sigmoid((sharpness * scores + noise) / temperature)
    # The chain rule, from sigmoid' = sigmoid * (1 - sigmoid).
    slope = gate * (1 - gate) * (sharpness / temperature)
    return gate, slope


def hard_concrete_gate(scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Gate clip(sigmoid((s + noise) / beta) * (zeta - gamma) + gamma, 0, 1) and its slope, which is 0 where it clips.

    https://arxiv.org/abs/1712.01312, Eq. 10 and 11.

    Args:
        scores: Scores s, any shape.
        noise: Standard logistic noise, shape of ``scores``.
    """
    # Stretched beyond [0, 1] and clipped, so that the gate is exactly 0 or 1 with a probability above 0.
    share = torch.sigmoid((scores + noise) / BETA)
    stretched = share * (ZETA - GAMMA) + GAMMA
    # Where it is clipped, the gate is constant.
    is_inside = (stretched > 0) & (stretched < 1)
    slope = share * (1 - share) * ((ZETA - GAMMA) / BETA) * is_inside
    return stretched.clamp(0, 1), slope


def hard_concrete_kept_slope(scores: Tensor) -> Tensor:
    """d/ds of the probability that a hard concrete gate is not 0, Eq. 12 of https://arxiv.org/abs/1712.01312."""
    # The probability is sigmoid(s - beta * log(-gamma / zeta)): the gate is 0 where the stretched share is below 0.
    shift = BETA * math.log(-GAMMA / ZETA)
    return sigmoid_slope(scores - shift, 1.0)


def _gumbel(config: MaskConfig, scores: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gumbel_gate` with the sharpness and temperature at this point of training."""
    temperature = scheduled(config, config.temperature, config.temperature_end)
    sharpness = current_sharpness(config)
    return gumbel_gate(scores, noise, sharpness, temperature)


# In evaluation both cut scores at 0, at which a gate without noise is 1/2.
register_learner(
    "gumbel",
    Learner(
        options=("price", "sharpness", "sharpness_end", "temperature", "temperature_end"),
        cut=lambda config: 0.0,
        # Open with probability sigmoid(3) = 0.95.
        start=lambda config: 3 / config.sharpness,
        soft_gate=_gumbel,
        kept_slope=logit_kept_slope,
    ),
)
register_learner(
    "hard_concrete",
    Learner(
        options=("price",),
        cut=lambda config: 0.0,
        # Not 0 with probability sigmoid(3 - beta * log(-gamma / zeta)) = 0.99.
        start=lambda config: 3.0,
        # No schedule: beta is constant, and the scores have no factor.
        soft_gate=lambda config, scores, noise: hard_concrete_gate(scores, noise),
        kept_slope=lambda config, scores, slope: hard_concrete_kept_slope(scores),
    ),
)
