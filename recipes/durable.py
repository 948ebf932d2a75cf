"""Writing that a full disk or a loss of power leaves whole: the earlier file, or the new one, and only whole lines."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError; the earlier file is then as it was."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)  # on a full disk its bytes are needed
        raise
    synchronise(path.parent)


def append_lines(path: Path, text: str) -> None:
    """Add whole lines, which end in a newline. Raises OSError; the file then ends where it ended before.

    Half a line at the end, left by a crash, is cut off first: a line added to it would be lost with it. Not
    synchronised: each step would wait for the disk, for rows behind the last checkpoint, which a resume cuts anyway.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = _end_of_lines(descriptor)
        os.ftruncate(descriptor, end)
        waiting = memoryview(text.encode())
        try:
            at = end
            while waiting:  # a disk that fills up takes a part without an error
                written = os.pwrite(descriptor, waiting, at)
                waiting, at = waiting[written:], at + written
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def synchronise(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int, block: int = 1 << 16) -> int:
    """The offset behind the last newline, in bytes."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - block)
        at = os.pread(descriptor, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
