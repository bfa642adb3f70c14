"""Learners of masks: step time and peak memory of each beside the plain top-k mask, each on the same layers."""

from __future__ import annotations

import multiprocessing

import torch
from peft import get_peft_model

from maskft import MaskConfig, adapter_layers, set_mask_progress
from maskft_common.memory import peak_memory_bytes

from .common import DELETION, SMOLLM2, TINY, Step, alternate, build

PLAIN = "topk"
LEARNERS = {
    PLAIN: {},
    "topk, ramp": {"sparsity_ramp": 1.0},
    "topk, removed value of the base": {"removed_value": "base"},
    "threshold": {"selection": "threshold", "rank_by": "signed"},
    "logit, straight through": {"selection": "logit", "init_value": 0.04},
    "logit, sigmoid, price": DELETION,
    "gumbel": {"selection": "gumbel", "init_value": 3.0},
    "hard concrete": {"selection": "hard_concrete", "init_value": 3.0},
}
_MAX_STEPS = 1000  # of the training that a step belongs to


def run(report) -> None:
    """Add the rows."""
    if report.quick:
        name = "tiny"
        shape = TINY
        layers = [1, 2]
        tokens = 8
    else:
        name = "SmolLM2-135M layers 20-23"
        shape = SMOLLM2
        layers = list(range(20, 24))
        tokens = 128
    # Each learner is compared with the plain one, on the same layers.
    others = [learner for learner in LEARNERS if learner != PLAIN]

    # With one micro-batch a step pays for a whole refresh, with four they share it.
    for accumulation in (1, 4):
        sides = [_LearnerStep(learner, shape, layers, tokens, accumulation, report.device) for learner in LEARNERS]
        alternated = alternate(sides, report.rounds, report.device)
        times = dict(zip(LEARNERS, alternated, strict=True))
        for learner in others:
            what = f"{name}: {learner} / {PLAIN}, step"
            report.add_ratio(
                "learners",
                what,
                times[learner],
                times[PLAIN],
                tokens=tokens,
                accumulation=accumulation,
            )

    # GB of each.
    peaks = {learner: _peak(learner, shape, layers, tokens, report) / 1e9 for learner in LEARNERS}
    for learner in others:
        report.add(
            "learners",
            f"{name}: {learner} / {PLAIN}, memory",
            peaks[learner] / peaks[PLAIN],
            "x",
            first_GB=peaks[learner],
            second_GB=peaks[PLAIN],
        )


class _LearnerStep(Step):
    """A step that sets the progress of training, on which ramps, schedules and noise depend."""

    def __init__(
        self,
        learner: str,
        shape: dict,
        layers: list[int],
        tokens: int,
        accumulation: int,
        device,
    ):
        settings = dict(LEARNERS[learner])
        is_base = settings.pop("removed_value", "zero") == "base"
        config = MaskConfig(layers_to_transform=layers, **settings)
        model = get_peft_model(build(shape, device), config)
        if is_base:
            # Set here as loading the base would set it, because there is no file to load one from.
            for layer in adapter_layers(model).values():
                layer.mask_configs["default"].removed_value = "base"
                layer.removed_values["default"] = layer.weight.detach() * 0.5
        super().__init__(model, shape["vocab_size"], tokens, accumulation, device)
        self.count = 0

    def __call__(self) -> None:
        """Run the step."""
        progress = min(self.count / _MAX_STEPS, 1.0)
        set_mask_progress(self.model, progress)
        self.count += 1
        super().__call__()


def _peak(
    learner: str,
    shape: dict,
    layers: list[int],
    tokens: int,
    report,
) -> int:
    """Peak bytes of a learner. In a new process, because the peak of a process never falls."""
    context = multiprocessing.get_context("spawn")
    arguments = (learner, shape, layers, tokens, str(report.device), torch.get_num_threads())
    with context.Pool(1) as pool:
        return pool.apply(_measure, arguments)


def _measure(
    learner: str,
    shape: dict,
    layers: list[int],
    tokens: int,
    device: str,
    threads: int,
) -> int:
    torch.set_num_threads(threads)
    where = torch.device(device)
    # Three steps: the second has the optimizer's state from its beginning.
    step = _LearnerStep(learner, shape, layers, tokens, 2, where)
    for _ in range(3):
        step()
    # Named: on a machine with a GPU the default would be the GPU, also of a step on the CPU.
    return peak_memory_bytes(where.type)
