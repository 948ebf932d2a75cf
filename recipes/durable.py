"""The one place that writes what must outlast a full disk, a kill and a loss of power.

A file, or a folder, is the earlier one or the new one, whole; a log has only whole lines. Each is written beside its
place (`.NAME.tmp`), brought to the disk, and renamed; the entry of its name is brought there too. Libraries that write
by themselves get such a place to write to. `tests/test_writers.py` finds whatever writes elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SCRATCH = ".tmp"
"""Ends the hidden name of what is not whole yet, or any more: whoever owns the place may remove it."""
REPLACED = ".old"
"""Ends the hidden name of a folder while another one takes its place (`recover`)."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""In the text of a Rust library's exception."""
NOT_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)
"""What a file system says that cannot synchronise a folder, or does not let this user."""


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8. Raises OSError, as `replacing` does."""
    with replacing(path) as scratch:
        scratch.write_bytes(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; the file that is there in the end takes the place of `path`.

    Raises OSError; the earlier file is then there still, or the new one, whole.
    """
    scratch = path.with_name(f".{path.stem}{SCRATCH}{path.suffix}")  # writers of images go by the suffix
    with _named(path):
        try:
            yield scratch
            synchronise(scratch)
            scratch.replace(path)
        except BaseException:
            remove(scratch)  # on a full disk its bytes are needed
            raise
        synchronise(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file in a folder that is published as a whole, open for its bytes; on the disk in the end. Raises OSError."""
    with _named(path), path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, text: str) -> None:
    """Add whole lines, which end in a newline. Raises OSError; the file then ends where it ended before.

    Half a line at the end, left by a crash, is cut off first: a line added to it would be lost with it. Not
    synchronised: each step would wait for the disk.
    """
    with _named(path):
        _append(path, text.encode())


def _append(path: Path, text: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = _end_of_lines(descriptor)
        if os.fstat(descriptor).st_size > end:
            os.ftruncate(descriptor, end)
        waiting = memoryview(text)
        try:
            at = end
            while waiting:  # a disk that fills up takes a part without an error
                written = os.pwrite(descriptor, waiting, at)
                waiting, at = waiting[written:], at + written
        except OSError:
            with contextlib.suppress(OSError):  # else the next append cuts it
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def log(path: Path) -> int:
    """A descriptor for what a process says as it goes, from the start of the file; never synchronised."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)


def move(path: Path, target: Path) -> None:
    """Give a file that may be open another name in its folder. Raises OSError."""
    path.replace(target)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that what is put there can be found. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        synchronise(folder.parent)


def publish(scratch: Path, folder: Path) -> None:
    """Let a folder that was written beside take the place of `folder`, all of it on the disk before.

    Raises OSError; what was there is then there still, or again (after a loss of power: by `recover`).
    """
    for path in sorted(scratch.rglob("*")):
        synchronise(path)
    synchronise(scratch)
    before = _hidden(folder, REPLACED)
    there = os.path.lexists(folder)
    if there:
        remove(before)
        folder.rename(before)
    try:
        scratch.rename(folder)
    except OSError:
        if there:
            before.rename(folder)
        raise
    synchronise(folder.parent)
    remove(before)


def recover(folder: Path) -> None:
    """Bring back what `publish` had put aside when it was broken off; what it had published needs none of it.

    Raises OSError.
    """
    before = _hidden(folder, REPLACED)
    if before.is_dir():
        if folder.exists():
            remove(before)
        else:
            before.rename(folder)
            synchronise(folder.parent)


def replaced(folder: Path, pattern: str) -> list[Path]:
    """The folders below `folder` whose names match, and that `publish` has put aside."""
    return [folder / left.name[1 : -len(REPLACED)] for left in sorted(folder.glob(f".{pattern}{REPLACED}"))]


def beside(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return _hidden(path, SCRATCH)


def remove(path: Path) -> bool:
    """Delete a folder, or a file, so that it is whole or gone under its name; never fails: what cannot go stays.

    Returns whether nothing of it is left.
    """
    if not path.is_dir() or path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return not os.path.lexists(path)
    hidden = path if path.name.startswith(".") else beside(path)
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            path.rename(hidden)
        except OSError:
            hidden = path
    for _ in range(2):  # once more, if a disk was busy
        shutil.rmtree(hidden, ignore_errors=True)
    return not os.path.lexists(hidden)


def synchronise(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk. Raises OSError."""
    folder = path.is_dir()
    try:
        with _named(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if not (folder and error.errno in NOT_OF_FOLDERS):
            raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the system say which file they are about: of a write they do not know."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def of_the_system(path: Path | str) -> Iterator[None]:
    """What tokenizers and safetensors say of a disk is an OSError about `path`, as everyone else's is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (code := OS_ERROR.search(str(error))) is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


def told(error: OSError) -> str:
    """What a person reads of it: the file, and what the system says."""
    return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")


def _hidden(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}{end}")


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
