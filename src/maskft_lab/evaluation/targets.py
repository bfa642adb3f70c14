"""Where the results of an evaluation go: a label for each model, and its result file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from maskft_base import files
from maskft_base.errors import UserError, printable

from .load import training_seed


def labels(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """One label per model: the user's, else its folder's name with as many of the folders above as tell it from others.

    Args:
        sources: Folders of models or adapters, or hub names.
        names: Labels by the user; none: from the sources.
    """
    if names:
        if len(names) != len(sources):
            raise UserError(f"{len(names)} names for {len(sources)} models; give one --name for each")
        for name in names:
            if not name.strip() or printable(name) != name:
                raise UserError(f"{name!r} is not a valid --name; use printable characters")
        return list(names)
    # `.` and `..` have names too; a hub name is none of a folder.
    paths = [Path(source).resolve() if Path(source).exists() else Path(source) for source in sources]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        found = ["-".join(part.strip("/") for part in path.parts[-depth:]) for path in paths]
        if len(set(found)) == len(found):
            break
    return [printable(name) for name in found]


def result_files(output_dir: str, names: Sequence[str], sources: Sequence[str]) -> list[Path]:
    """The result file of each model: of one in ``output_dir``, of several in a folder for each label.

    Training seeds of one method have one label; their folders have the seed in their names.

    Raises:
        UserError: If two models would have the same file, or the folder cannot be written to.
    """
    _check_writable(Path(output_dir))
    if len(sources) == 1:
        return [Path(output_dir) / files.RESULT]
    folders = []
    for name, source in zip(names, sources, strict=True):
        seed = training_seed(source) if names.count(name) > 1 else None
        folders.append(name if seed is None else f"{name}-seed{seed}")
    for folder in folders:
        if folder in (".", "..") or "/" in folder:
            raise UserError(f"{folder!r} names a folder inside output_dir; give a --name without a slash")
    if len(set(folders)) < len(folders):
        raise UserError(
            f"two models have the same label ({', '.join(folders)}) and were not trained with different seeds; tell "
            "them apart with --name"
        )
    return [Path(output_dir) / folder / files.RESULT for folder in folders]


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, hours before something is."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        problem = "there is no permission for it" if place.is_dir() else "it is a file"
        raise UserError(f"output_dir {str(folder)!r} cannot be written below {place}: {problem}; name another")
