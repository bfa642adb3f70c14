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
_MAX_STEPS = 1000


def run(report) -> None:
    """Add the rows."""
    shape, layers, tokens = (TINY, [1, 2], 8) if report.quick else (SMOLLM2, list(range(20, 24)), 128)
    name = "tiny" if report.quick else "SmolLM2-135M layers 20-23"
    for accumulation in (1, 4):
        sides = [_LearnerStep(learner, shape, layers, tokens, accumulation, report.device) for learner in LEARNERS]
        times = dict(zip(LEARNERS, alternate(sides, report.rounds, report.device), strict=True))
        for learner in list(LEARNERS)[1:]:
            what = f"{name}: {learner} / {PLAIN}, step"
            report.add_ratio("learners", what, times[learner], times[PLAIN], tokens=tokens, accumulation=accumulation)
    peaks = {learner: _peak(learner, shape, layers, tokens, report) for learner in LEARNERS}
    for learner in list(LEARNERS)[1:]:
        what, gigabytes = f"{name}: {learner} / {PLAIN}, memory", (peaks[learner] / 1e9, peaks[PLAIN] / 1e9)
        report.add("learners", what, gigabytes[0] / gigabytes[1], "x", first_GB=gigabytes[0], second_GB=gigabytes[1])


class _LearnerStep(Step):
    """A step that says how far training is."""

    def __init__(self, learner: str, shape: dict, layers: list[int], tokens: int, accumulation: int, device):
        model, settings = build(shape, device), dict(LEARNERS[learner])
        is_base = settings.pop("removed_value", "zero") == "base"
        model = get_peft_model(model, MaskConfig(layers_to_transform=layers, **settings))
        for layer in adapter_layers(model).values() if is_base else ():
            # As loading the base would leave it, without a file to load it from.
            layer.mask_configs["default"].removed_value = "base"
            layer.removed_values["default"] = layer.weight.detach() * 0.5
        super().__init__(model, shape["vocab_size"], tokens, accumulation, device)
        self.count = 0

    def __call__(self) -> None:
        """Run the step."""
        set_mask_progress(self.model, min(self.count / _MAX_STEPS, 1.0))
        self.count += 1
        super().__call__()


def _peak(learner: str, shape: dict, layers: list[int], tokens: int, report) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        given = (learner, shape, layers, tokens, str(report.device), torch.get_num_threads())
        return pool.apply(_measure, given)


def _measure(learner: str, shape: dict, layers: list[int], tokens: int, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    step = _LearnerStep(learner, shape, layers, tokens, 2, torch.device(device))
    for _ in range(3):
        step()
    return peak_memory_bytes()
