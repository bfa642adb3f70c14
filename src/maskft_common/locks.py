"""A folder that belongs to one process at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .errors import UserError
from .files import check_output_dir


class Hold(NamedTuple):
    """A folder that this process holds.

    Attributes:
        descriptor: Of the lock's file; child processes inherit it.
        is_left_over: Whether the file existed before: an owner that was killed leaves it.
    """

    descriptor: int
    is_left_over: bool


@contextmanager
def held(
    folder: Path,
    name: str,
    wait_s: float,
    owner: str,
) -> Iterator[Hold]:
    """Make a folder and lock a file in it; the kernel releases the lock when its owner dies, however that happens.

    Args:
        folder: The folder. Folders that are made for it and empty at the end are removed.
        name: Of the lock's file, which is removed at the end.
        wait_s: Seconds to wait for an owner that is ending.
        owner: Who else may hold it, for the message.

    Raises:
        UserError: If it is a file, or someone else holds it.
    """
    check_output_dir(folder)
    # The innermost first, so that each is empty when it is removed at the end.
    places = [folder, *folder.parents]
    made = [place for place in places if not place.exists()]

    deadline = time.monotonic() + wait_s
    hold = _try_to_hold(folder, name)
    while hold is None:
        if time.monotonic() > deadline:
            # Nobody holds it: on some file systems, such as /proc, making a folder fails as if one above were removed.
            if not folder.is_dir():
                raise UserError(f"output_dir {str(folder)!r} cannot be made; name another folder")
            raise UserError(f"another {owner} is running in {str(folder)!r}; wait for it or stop it")
        time.sleep(0.2)
        hold = _try_to_hold(folder, name)

    try:
        yield hold
    finally:
        # Before it is released: the next owner makes its own.
        (folder / name).unlink(missing_ok=True)
        os.close(hold.descriptor)
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()


def _try_to_hold(folder: Path, name: str) -> Hold | None:
    """Lock the file; None if another process holds it, or has just removed it."""
    # Imported here, because it is missing on Windows.
    import fcntl

    file = folder / name
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_left_over = file.exists()
        descriptor = os.open(file, flags, 0o666)
    except FileNotFoundError:
        # Its last owner has just removed the folder, or one above it.
        return None
    try:
        # Not blocking: the caller waits, with a deadline.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An owner removes the file before it releases the lock: this may be the lock of a file that no longer exists,
        # while another process holds a new file of the same name.
        locked = os.fstat(descriptor)
        is_current = os.path.samestat(locked, file.stat())
    except (BlockingIOError, FileNotFoundError):  # locked by another process; removed by its owner
        is_current = False
    if is_current:
        return Hold(descriptor, is_left_over)
    os.close(descriptor)
    return None
