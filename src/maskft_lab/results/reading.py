"""Results of files and folders, ours and lm-eval's samples; ``NAME=PATH`` names a model."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from maskft_common import files, layout
from maskft_common.errors import UserError
from maskft_common.files import parse_json, read_text

from .lm_eval_samples import is_samples_file, read_samples, samples_in
from .schema import MAX_RESULT_LENGTH, Result, check_result, read_result, result_file

# Points of a path, and results that are still being measured.
_LEFT_OUT = re.compile(r"(^|/)path/|\.partial/")


def read_all(paths: Iterable[str]) -> list[Result]:
    """Return the results of files and folders, in the order given.

    A folder holds results: its ``result.json``, or all results in it and below, except points of paths and partial
    results. Or it holds lm-eval's ``samples_*.jsonl``, which are the tasks of one model, in it or in folders below,
    each of which is a model.

    Args:
        paths: Paths, or ``NAME=PATH``.

    Raises:
        UserError: If a file is not a result, or is damaged.
    """
    results: list[Result] = []
    for text in paths:
        # A folder may hold many results, all of which get the name that the user gave.
        name, path = _name_and_path(text)
        for found in _files_of(path):
            # The files of a folder of lm-eval are tasks of one model; ours are a result each.
            if is_samples_file(found[0]):
                results.append(read_samples(found, name))
                continue
            result = read_result(found[0])
            if name:
                # Checked again, because the name is the user's.
                result = check_result({**result, "name": name}, path)
            results.append(result)
    return results


def input_files(paths: Iterable[str]) -> set[Path]:
    """Return every file that would be read, resolved."""
    out: set[Path] = set()
    for text in paths:
        _, path = _name_and_path(text)
        for found in _files_of(path):
            out |= {file.resolve() for file in found}
    return out


def check_output(
    output: str | None,
    results: Iterable[str],
) -> None:
    """Raise if an output file is one of the results, which it would replace, or cannot be written.

    Args:
        output: Path of the output; None for standard output.
        results: Paths as `read_all` takes them.

    Raises:
        UserError: If it is one of the files that would be read, a folder, or below a file.
    """
    if not output:
        return
    files.check_place(output, "--output")
    # Resolved, because two paths may be of one file.
    if files.expand_user(output).resolve() in input_files(results):
        raise UserError(f"--output {output} is one of the results and would replace it: name another file")


def _name_and_path(text: str) -> tuple[str | None, Path]:
    """Split ``NAME=PATH``; the name is None where there is a path alone."""
    name, separator, path = text.partition("=")
    # ``NAME=`` has a name and nothing to read.
    if not text or (separator and not path):
        raise UserError(f"{text!r} names no file: give a result, a folder of results, or NAME=PATH")
    if not separator or not name:
        return None, files.expand_user(text)
    # A path may have an equals sign in it.
    if "/" in name or files.is_there(text):
        return None, files.expand_user(text)
    return name, files.expand_user(path)


def _files_of(path: Path) -> list[list[Path]]:
    """Return the files of each result of a path, at least one; it need not exist."""
    if not path.is_dir():
        return [[path]]
    # The folder of one result. Further results below it, such as the points of its path, are not meant.
    if (path / layout.RESULT).is_file():
        return [[result_file(path)]]
    samples = samples_in(path)
    if samples:
        return [samples]

    # Sorted together, so that the order of models does not depend on the file system.
    plain = path.rglob("*.json")
    gzipped = path.rglob("*.json.gz")
    candidates = sorted([*plain, *gzipped])
    found: list[list[Path]] = []
    for file in candidates:
        place = str(file.relative_to(path))
        if not _LEFT_OUT.search(place) and is_result(file):
            found.append([file])

    # lm-eval makes a folder for each model below its --output_path.
    folders = sorted({file.parent for file in path.rglob("samples_*.jsonl*")})
    for folder in folders:
        samples = samples_in(folder)
        if samples:
            found.append(samples)

    # Without any, the file that should be there: reading it raises an error with its name.
    return found or [[result_file(path)]]


def is_result(file: Path) -> bool:
    """Whether a file is a result, or a damaged one: reading it reports the damage."""
    # A folder's name may end in .json, too.
    if not file.is_file():
        return False
    if file.name == layout.RESULT:
        return True
    try:
        text = read_text(file, MAX_RESULT_LENGTH)
        # gzip reads an empty file as an empty text.
        if not text and file.suffix == ".gz":
            return True
        # Text is searched before it is parsed: a folder of runs is full of tokenizers, whose JSON takes long.
        if '"evaluation"' not in text:
            return False
        content = parse_json(text)
    except (ValueError, OSError, EOFError, zlib.error):
        # Left out, it would change what is compared without a word. Gzipped JSON in such folders is results; plain ones
        # begin with their kind.
        return file.suffix == ".gz" or _begins_as_result(file)
    # The word may have been in a text of another file.
    return isinstance(content, dict) and content.get("kind") == "evaluation"


def _begins_as_result(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            beginning = stream.read(200)
    except OSError:
        return False
    return b'"kind": "evaluation"' in beginning
