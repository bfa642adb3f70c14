"""A checkpoint with its files on the disk and their manifest, against the same files left to the page cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from maskft.training.checkpoints import Checkpoints
from maskft.training.manifest import Course, damage, seal
from maskft_base import files
from maskft_base.runtime import largest


def run(report) -> None:
    """Add the rows."""
    numel = 2**12 if report.quick else 50_000_000
    scores, moments = torch.randn(numel), [torch.randn(numel), torch.randn(numel)]
    course = Course(options={}, data="", base="")
    report.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=report.folder) as name:
        folder = Path(name)

        def write():
            save_file({"scores": scores}, folder / files.ADAPTER_WEIGHTS)
            torch.save({"state": moments}, folder / "optimizer.pt")

        def write_and_sync():
            write()
            for file in folder.iterdir():
                files.sync(file)

        def write_whole():
            write()
            seal(folder, 1, 1, course)

        size = f"checkpoint of {12 * numel / 1e6:.1f} MB"
        report.compare("saving", f"{size}, whole / written only", write_whole, write)
        report.compare("saving", f"{size}, whole / on the disk", write_whole, write_and_sync)
        report.compare("saving", f"{size}, checked / written only", lambda: damage(folder), write)
        assert damage(folder) is None

        # As training does it: the checkpoint is made whole beside the next step, on another core where there is one.
        trainer, checkpoints = stand_in_for_a_trainer(), Checkpoints(course)
        left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)

        def step():
            for _ in range(2 if report.quick else 150):
                left @ right

        def save_beside_a_step():
            write()
            checkpoints.seal(trainer, folder)
            step()
            checkpoints.finish()

        def save_and_step():
            write()
            step()

        report.compare(
            "saving", f"{size}, whole beside a step / written, and a step", save_beside_a_step, save_and_step
        )
        assert damage(folder) is None
    flag = torch.tensor(False)

    def agree():
        return largest(torch.full_like(flag, False), flag, flag)

    report.compare("saving", "a step's verdict with the wish to stop / without", agree, lambda: largest(flag, flag))


def stand_in_for_a_trainer() -> SimpleNamespace:
    """What making a checkpoint whole asks of a trainer."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        state=SimpleNamespace(global_step=1, best_model_checkpoint=None),
        args=SimpleNamespace(world_size=1),
        control=SimpleNamespace(should_training_stop=False),
    )
