"""A checkpoint with its files on the disk and their manifest, against the same files left to the page cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from maskft import files
from maskft.runtime import largest
from maskft.training.manifest import Course, damage, seal


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
    flag = torch.tensor(False)

    def agree():
        return largest(torch.full_like(flag, False), flag, flag)

    report.compare("saving", "a step's verdict with the wish to stop / without", agree, lambda: largest(flag, flag))
