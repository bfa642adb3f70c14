"""Which weights a mask keeps: the learners that ``MaskConfig.selection`` can name, and their gates.

    W_eff = R + (W - R) * gate(s)          gate 1 keeps a weight W, gate 0 replaces it by R (0, or a given value)
    dL/ds = dL/dW_eff * (W - R) * sign(s) * slope(s)

A hard gate is a bool mask, True = keep. Its slope is chosen: the straight-through slope is 1. A soft gate is a float32
tensor in [0, 1] and its slope is its derivative; it is used in training mode only. In evaluation, in the saved file and
in a merged weight every gate is hard.

Where magnitudes are ranked (``MaskConfig.ranks_by``), the slope of a gate is that by |s|. Where values are, sign(s) is
left out, and the slope is that by s.

``topk``, ``threshold`` and ``logit`` are built in. Others join with :func:`register_learner`, see
``docs/learners.md``; ``maskft.learners`` has some.

Shapes: s are the scores, float32; all tensors have the shape of the weight; hard gates are bool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskft_common.errors import UserError
from maskft_common.files import digest

from ..masking import check_not_nan, num_removed, ranking_keys, remove_lowest

if TYPE_CHECKING:
    from .config import MaskConfig


@dataclass(frozen=True)
class Learner:
    """One value of ``MaskConfig.selection``.

    Attributes:
        options: Fields of MaskConfig that this learner reads and some others do not; those others refuse them.
        cut: (config) -> float; a weight is kept if its ranking value is above it. None: a fixed share is removed.
        start: (config) -> float; center of fresh scores at which nearly all weights are kept. Only for learners that
            cut at 0. None: scores are ranked, or compared with a threshold, as they are.
        soft_gate: (config, scores, noise) -> (gate, slope by the ranking value) in training mode. None: the gate
            is hard in training too.
        hard_slope: (config, scores) -> slope of the hard gate. None, or if it returns None: 1.
        kept_slope: (config, scores, slope of the hard gate or None for 1) -> derivative of the relaxed number of kept
            weights; ``price`` multiplies it. None: ``price`` is not an option.
    """

    options: tuple[str, ...]
    cut: Callable[[MaskConfig], float] | None = None
    start: Callable[[MaskConfig], float] | None = None
    soft_gate: Callable[[MaskConfig, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    hard_slope: Callable[[MaskConfig, Tensor], Tensor | None] | None = None
    kept_slope: Callable[[MaskConfig, Tensor, Tensor | None], Tensor] | None = None

    def __post_init__(self) -> None:
        # The first backward pass would fail, or the price never be read.
        has_slope = self.kept_slope is not None
        if has_slope != ("price" in self.options):
            raise ValueError("a learner has kept_slope if and only if 'price' is among its options")


LEARNERS: dict[str, Learner] = {}


def register_learner(name: str, learner: Learner) -> None:
    """Add a learner, so that ``MaskConfig(selection=name)`` finds it.

    Raises:
        ValueError: If the name is taken.
    """
    if name in LEARNERS:
        raise ValueError(f"there is a learner named {name!r} already; choose another name")
    LEARNERS[name] = learner


# Schedules: values that depend on the share of training done, `config.progress`


def scheduled(config: MaskConfig, start: float, end: float | None) -> float:
    """A value that moves linearly from ``start`` to ``end`` over training; constant if ``end`` is None."""
    if end is None:
        return start
    # None before training; in training mode check_progress raises for it.
    progress = config.progress or 0.0
    return start + (end - start) * progress


def current_sharpness(config: MaskConfig) -> float:
    """Factor of the scores inside the sigmoid at this point of training."""
    return scheduled(config, config.sharpness, config.sharpness_end)


def cubic_ramp(progress: float, ramp: float) -> float:
    """Share of the final sparsity: 1 - (1 - t)^3 with t from 0 to 1 over the first ``ramp`` of training.

    https://arxiv.org/abs/1710.01878, Eq. 1, from sparsity 0.

    Args:
        progress: Share of training done, in [0, 1].
        ramp: Share of training that the ramp takes, in [0, 1]; 0 returns 1 at once.
    """
    # Also where both are 0, so that the division below is never by 0.
    if progress >= ramp:
        return 1.0
    return 1 - (1 - progress / ramp) ** 3


def current_sparsity(config: MaskConfig) -> float:
    """Fraction that a top-k mask removes at this point of training, in [0, 1)."""
    progress = config.progress or 0.0
    share = cubic_ramp(progress, config.sparsity_ramp)
    return float(config.sparsity) * share


# The learners built in


def sigmoid_slope(scores: Tensor, sharpness: float) -> Tensor:
    """Slope k * sigmoid'(k * s) of a logit learner, which trains the scores near 0 the most."""
    # k * p * (1 - p) with p = sigmoid(k * s), in two matrices: written out, it would make five.
    share = torch.mul(scores, sharpness).sigmoid_()
    complement = 1 - share
    return complement.mul_(share.mul_(sharpness))


def logit_kept_slope(config: MaskConfig, scores: Tensor, slope: Tensor | None) -> Tensor:
    """d/ds of sigmoid(k * s), the relaxed number of kept weights; the ``slope`` of a sigmoid gate is the same."""
    if slope is not None:
        return slope
    return sigmoid_slope(scores, current_sharpness(config))


def _just_below_threshold(config: MaskConfig) -> float:
    # `threshold` removes scores below it and keeps one that is equal; `cut` keeps scores above it. So the cut is the
    # float32 number before the threshold. math.nextafter would give the float64 number before it, which rounds to the
    # threshold itself.
    threshold = torch.tensor(config.threshold, dtype=torch.float32, device="cpu")
    downwards = torch.tensor(-math.inf, dtype=torch.float32, device="cpu")
    below = torch.nextafter(threshold, downwards)
    return below.item()


def _logit_slope(config: MaskConfig, scores: Tensor) -> Tensor | None:
    if config.gradient == "sigmoid":
        return sigmoid_slope(scores, current_sharpness(config))
    return None


register_learner(
    "topk",
    Learner(options=("sparsity", "sparsity_ramp")),
)
register_learner(
    "threshold",
    Learner(
        options=("threshold",),
        cut=_just_below_threshold,
    ),
)
# A weight is kept with probability sigmoid(k * s); the hard gate cuts at a probability of a half.
register_learner(
    "logit",
    Learner(
        options=("gradient", "price", "sharpness", "sharpness_end"),
        cut=lambda config: 0.0,
        # No lower bound: `start_value` takes two standard deviations.
        start=lambda config: 0.0,
        hard_slope=_logit_slope,
        kept_slope=logit_kept_slope,
    ),
)


# Questions about a learner


def learner_options() -> list[str]:
    """Fields of MaskConfig that some learners read and others do not; each once, in the order of the learners."""
    # A dictionary as a set that keeps its order.
    options: dict[str, None] = {}
    for learner in LEARNERS.values():
        options.update(dict.fromkeys(learner.options))
    return list(options)


def names_with(option: str) -> str:
    """The learners that read an option, for messages."""
    names = [name for name, learner in LEARNERS.items() if option in learner.options]
    return " and ".join(names)


def is_free(selection: str) -> bool:
    """Whether scores are cut at 0, so that training decides how many weights are removed."""
    # A name that is not registered is reported later, by MaskConfig._check_choices.
    return selection in LEARNERS and LEARNERS[selection].start is not None


def has_soft_gate(config: MaskConfig) -> bool:
    """Whether the gate is soft in training mode."""
    return LEARNERS[config.selection].soft_gate is not None


def is_soft(config: MaskConfig, is_training: bool) -> bool:
    """Whether the gate is soft now. A frozen copy (the reference of preference training) is always hard."""
    return has_soft_gate(config) and is_training and not config.copy_of


def check_progress(config: MaskConfig, is_training: bool) -> None:
    """Raise if a mask in training depends on the share of training done, and this training has not set it."""
    # Noise is drawn from a stream named after the progress: without it, every step would get the same noise.
    has_schedule = config.sparsity_ramp > 0 or config.sharpness_end is not None
    depends_on_progress = has_schedule or has_soft_gate(config)
    if not depends_on_progress:
        return
    # The progress of a file is where an earlier training ended. An adapter that was loaded to be used keeps it.
    is_of_file = config.is_progress_of_file and not config.inference_mode
    is_unset = config.progress is None or is_of_file
    if is_training and not config.copy_of and is_unset:
        raise UserError(
            "this mask depends on how far training is: call maskft.set_mask_progress(model, step / max_steps) before "
            "every step (with transformers' Trainer: add_callback(maskft.MaskProgress()))"
        )


# From a configuration and its scores


def cut(config: MaskConfig) -> float | None:
    """The ranking value (see ``MaskConfig.ranks_by``) above which a weight is kept; None: its rank decides."""
    cut_of = LEARNERS[config.selection].cut
    if cut_of is None:
        return None
    return cut_of(config)


def mask_from_scores(config: MaskConfig, scores: Tensor) -> Tensor:
    """Hard mask of a score matrix; bool, shape of ``scores``, True = keep.

    Raises:
        UserError: If a score is NaN.
    """
    keys = ranking_keys(scores, config.ranks_by)
    highest_removed = cut(config)
    if highest_removed is None:
        sparsity = current_sparsity(config)
        num = num_removed(scores.numel(), sparsity)
        mask = remove_lowest(keys, num)
    else:
        # NaN > cut is False: without the check, weights would be removed in silence.
        check_not_nan(keys)
        mask = keys > highest_removed
    return mask.view(scores.shape)


def gate_and_slope(
    config: MaskConfig,
    scores: Tensor,
    module_name: str,
    is_training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gate of one matrix and its slope, as described at the top of this file.

    Args:
        config: Configuration of the adapter.
        scores: Its scores in this layer.
        module_name: Name of the layer; together with the seed and the progress it decides the noise.
        is_training: Whether the layer is in training mode.

    Returns:
        A bool gate (True = keep) with its slope (None: 1), or a float32 gate in [0, 1] with its slope.
    """
    check_progress(config, is_training)
    if is_soft(config, is_training):
        noise = draw_noise(config, module_name, scores.shape, scores.device)
        return soft_gate(config, scores, noise)
    mask = mask_from_scores(config, scores)
    slope = hard_slope(config, scores)
    return mask, slope


def soft_gate(
    config: MaskConfig,
    scores: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Soft gate and slope in training mode; only for learners that have one, see :func:`has_soft_gate`."""
    gate_of = LEARNERS[config.selection].soft_gate
    assert gate_of is not None
    return gate_of(config, scores, noise)


def hard_slope(config: MaskConfig, scores: Tensor) -> Tensor | None:
    """Slope of a hard gate; None for 1."""
    slope_of = LEARNERS[config.selection].hard_slope
    if slope_of is None:
        return None
    return slope_of(config, scores)


def price_gradient(
    config: MaskConfig,
    scores: Tensor,
    numel: int,
    slope: Tensor | None = None,
) -> Tensor:
    """Derivative of price * (share of the weights removed) with respect to scores.

    Args:
        config: Configuration of the adapter; its learner has ``price`` as an option.
        scores: Scores of a matrix, or of some of its rows.
        numel: Number of weights of the whole matrix.
        slope: Slope of their hard gate; None: 1.
    """
    kept_slope_of = LEARNERS[config.selection].kept_slope
    assert kept_slope_of is not None
    # The share removed is 1 - kept / numel.
    kept_slope = kept_slope_of(config, scores, slope)
    return kept_slope * (-config.price / numel)


def blend(weight: Tensor, gate: Tensor, removed_value: Tensor | None = None) -> Tensor:
    """The effective weight W_eff.

    With a bool gate each entry is exactly W or R. It is +0 where ``removed_value`` is None: a product would give -0 for
    negative weights and keep NaN.
    """
    if gate.dtype == torch.bool:
        if removed_value is None:
            return weight.masked_fill(~gate, 0.0)
        return torch.where(gate, weight, removed_value)
    # A soft gate.
    if removed_value is None:
        return weight * gate
    return removed_value + (weight - removed_value) * gate


# Noise of soft gates


def draw_noise(
    config: MaskConfig,
    module_name: str,
    shape: torch.Size,
    device: torch.device,
) -> Tensor:
    """Noise of one matrix, decided by the seed, the name, the progress and the kind of device.

    Nothing is kept between steps, so that a resumed run draws the noise of an uninterrupted one.
    """
    # repr, which gives back the same float, so that equal progress means equal noise.
    progress = repr(config.progress)
    stream = generator(device, config.mask_seed, module_name, progress)
    return logistic_noise(shape, stream)


def logistic_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard logistic noise, the difference of two Gumbel variables."""
    # The inverse of the distribution function, log(u / (1 - u)), at uniform draws.
    uniform = torch.rand(
        shape,
        generator=generator,
        dtype=torch.float32,
        device=generator.device,
    )
    # It is infinite at 0 and 1.
    uniform.clamp_(1e-7, 1 - 1e-7)
    return uniform.log() - torch.log1p(-uniform)


def generator(device: torch.device | str, *stream: object) -> torch.Generator:
    """A generator for each ``stream`` of names and numbers, so that draws in one layer do not affect another."""
    # The plain way, hash(stream), gives another number in each process.
    name = "/".join(map(str, stream))
    first_bytes = bytes.fromhex(digest(name))[:8]
    # 63 bits, which fit a signed 64-bit integer.
    seed = int.from_bytes(first_bytes, "little") >> 1
    return torch.Generator(device).manual_seed(seed)
