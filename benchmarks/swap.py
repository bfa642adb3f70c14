"""Another mask in a running model, by three ways, against loading model and mask again; each with one forward pass."""

from __future__ import annotations

import tempfile
from itertools import cycle
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from maskft import MaskConfig
from maskft.adapter.patch import apply_patch, read_patch, undo_patch
from maskft.adapter.swap import swap_mask

from .common import SMOLLM2, TINY, build


def run(report) -> None:
    """Add the rows."""
    shape = TINY if report.quick else SMOLLM2
    with tempfile.TemporaryDirectory() as place:
        base, folders = Path(place) / "base", [Path(place) / f"mask{seed}" for seed in range(2)]
        model = build(shape, report.device)
        model.save_pretrained(base)
        for seed, folder in enumerate(folders):
            get_peft_model(build(shape, report.device), MaskConfig(mask_seed=seed, sparsity=0.1)).save_pretrained(
                folder
            )
        ids = torch.zeros(1, 16, dtype=torch.long, device=report.device)
        sides = {"swap_mask": _swap, "set_adapter": _set_adapter, "undo and apply a patch": _patch}
        again = _load_again(base, folders, ids, report.device)
        for name, make in sides.items():
            what = f"{'tiny' if report.quick else 'SmolLM2-135M'}, all layers: load again / {name}"
            report.compare("swap", what, again, make(base, folders, ids, report.device), rounds=min(3, report.rounds))


def _forward(model, ids) -> None:
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)


def _load_again(base, folders, ids, device):
    turn = cycle(folders)

    def side() -> None:
        model = AutoModelForCausalLM.from_pretrained(base).to(device)
        _forward(PeftModel.from_pretrained(model, next(turn)).eval(), ids)

    return side


def _swap(base, folders, ids, device):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).to(device), folders[0]).eval()
    turn = cycle(reversed(folders))

    def side() -> None:
        swap_mask(model, next(turn))
        _forward(model, ids)

    return side


def _set_adapter(base, folders, ids, device):
    model = AutoModelForCausalLM.from_pretrained(base).to(device)
    model = PeftModel.from_pretrained(model, folders[0], adapter_name="0").eval()
    model.load_adapter(folders[1], "1")
    turn = cycle("10")

    def side() -> None:
        model.set_adapter(next(turn))
        _forward(model, ids)

    return side


def _patch(base, folders, ids, device):
    model = AutoModelForCausalLM.from_pretrained(base).to(device).eval()
    weights, undo = dict(model.named_parameters()), {}
    turn = cycle([read_patch(folder) for folder in folders])

    def side() -> None:
        nonlocal undo
        undo_patch(weights, undo)
        undo = apply_patch(weights, next(turn))
        _forward(model, ids)

    return side
