"""Keeping a part of what training has changed: the largest one within a budget of KL(base || model)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..fsdp import is_sharded, local_part, reshard, rows_of
from ..weights import write_part

# A part is near enough to the largest one if its KL is between this share of the budget and the budget.
_NEAR_ENOUGH = 0.9
# The search aims in between.
_AIM = 0.95
# Largest number of parts that are measured. Two or three are usual.
_MAX_TRIES = 10


class Change:
    """The change of a model's trainable parameters in training, of which a part may be taken back.

    At the part a each trainable parameter is start + a * (trained - start). For full fine-tuning that is WiSE-FT
    (https://arxiv.org/abs/2109.01903). An adapter is interpolated in its own parameters, so that it stays one. A mask
    is interpolated in its scores, and is binary at every part. LoRA is interpolated in the matrix that starts at zero,
    so that its change of the weights is scaled; with both matrices, less of the task is left at the same KL.

    Args:
        model: The model to train, before its first step.
        frozen: A copy of it that is kept anyway; None if there is none. Then the trainable parameters are copied to the
            CPU; by each process, whole.
    """

    def __init__(self, model: nn.Module, frozen: nn.Module | None = None):
        self._model = model
        # Where the parameters are: their module and their name in it. Names in the model may get prefixes
        # (torch.compile, DDP), and FSDP replaces the parameters by shards.
        self._places: list[tuple[nn.Module, str]] = []
        self._start: list[Tensor] = []
        frozen_parameters = {}
        if frozen is not None:
            frozen_parameters = dict(frozen.named_parameters())
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if not parameter.requires_grad or _has_zero_partner(name, parameters):
                continue
            module_name, _, parameter_name = name.rpartition(".")
            module = model.get_submodule(module_name)
            self._places.append((module, parameter_name))
            if name in frozen_parameters:
                self._start.append(frozen_parameters[name])
            else:
                self._start.append(_copy(parameter))

    @contextmanager
    def taken_back(self) -> Iterator[Callable[[float], None]]:
        """Gives a function that sets the part, in [0, 1]. At the end the model is as trained again, bit for bit."""
        trained = self._copies()

        def set_part(part: float) -> None:
            self._set(trained, part)

        try:
            yield set_part
        finally:
            set_part(1.0)

    def keep(self, part: float) -> None:
        """Keep only this part, in [0, 1], of what the parameters have changed."""
        self._set(self._copies(), part)

    def _copies(self) -> list[Tensor]:
        """Copies of the parameters; under FSDP of the rows that this process holds."""
        return [_copy(local_part(parameter)) for parameter in self._current_parameters()]

    def _set(self, trained: Sequence[Tensor], part: float) -> None:
        for parameter, start, end in zip(self._current_parameters(), self._start, trained, strict=True):
            if is_sharded(parameter):
                start = rows_of(start, parameter)
            write_part(local_part(parameter), start, end, part)

    def _current_parameters(self) -> list[Tensor]:
        # What is written to shards would not reach weights that are gathered already.
        reshard(self._model)
        return [getattr(module, name) for module, name in self._places]


def largest_part(
    kl_of: Callable[[float], float],
    kl_whole: float,
    budget: float,
) -> tuple[float, float] | None:
    """The largest part of a change that is within a budget, approximately.

    KL is taken to grow with the part. It does so for weights; of a mask, whose entries flip one by one, only roughly.

    Args:
        kl_of: Measures KL at a part, in nats per token.
        kl_whole: KL at the whole change, above the budget.
        budget: Nats per token.

    Returns:
        The part, in (0, 1), and its KL, between 0.9 of the budget and the budget if ten measurements suffice; None if
        no measured part is within the budget.
    """
    # Parts and their KL that are known to be within the budget, and beyond it.
    within: list[tuple[float, float]] = []
    beyond = [(1.0, kl_whole)]
    was_within = None
    num_alike = 0  # tries in a row on the same side of the budget
    for _ in range(_MAX_TRIES):
        part = _next_part(within, beyond, _AIM * budget)
        # The law does not hold where only one end moves, by little.
        if num_alike >= 3:
            part = _middle(within, beyond) if within else beyond[-1][0] / 4
        kl = kl_of(part)
        # A KL that is not a number counts as beyond.
        is_within = kl <= budget
        num_alike = num_alike + 1 if is_within == was_within else 1
        was_within = is_within
        if not is_within:
            beyond.append((part, kl))
            continue
        within.append((part, kl))
        if kl >= _NEAR_ENOUGH * budget:
            break
    # Each try was above those within, so the last of them is the largest.
    return within[-1] if within else None


def _next_part(
    within: Sequence[tuple[float, float]],
    beyond: Sequence[tuple[float, float]],
    aim: float,
) -> float:
    """A part whose KL is probably ``aim``: by a power law through the nearest known parts, or else in the middle."""
    high_part, high_kl = beyond[-1]
    low_part, low_kl = within[-1] if within else (0.0, 0.0)
    middle = _middle(within, beyond)

    # A second point for the law.
    other_part, other_kl = low_part, low_kl
    if not within and len(beyond) > 1:
        other_part, other_kl = beyond[-2]
    # Of small changes KL grows with the square.
    power = 2.0
    is_usable = 0 < other_kl < math.inf and other_kl != high_kl and other_part > 0
    if is_usable:
        power = math.log(high_kl / other_kl) / math.log(high_part / other_part)
    # A mask may lose KL where it changes more, and a KL that is not finite follows no law.
    if not (math.isfinite(high_kl) and power > 0):
        return middle
    part = high_part * (aim / high_kl) ** (1 / power)

    # Not too near to either end, or the other would hardly move.
    margin = 0.05 * (high_part - low_part)
    if not within:
        part = max(part, margin)
    is_inside = low_part + margin <= part <= high_part - margin
    return part if is_inside else middle


def _middle(within: Sequence[tuple[float, float]], beyond: Sequence[tuple[float, float]]) -> float:
    """Between the largest part known to be within the budget and the smallest known to be beyond."""
    high_part, _ = beyond[-1]
    low_part, _ = within[-1] if within else (0.0, 0.0)
    return (low_part + high_part) / 2


def _has_zero_partner(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a parameter is one of a LoRA's two matrices, and the other one is zero."""
    # PEFT starts B at zero, and of embeddings A.
    partner = name.replace("lora_A", "lora_B").replace("lora_embedding_B", "lora_embedding_A")
    if partner == name or partner not in parameters:
        return False
    return not parameters[partner].any()


def _copy(parameter: Tensor) -> Tensor:
    """A copy in the memory of the CPU."""
    return parameter.detach().to("cpu", copy=True)
