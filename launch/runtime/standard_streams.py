"""Standard output and error that nothing breaks: a closed pipe, a vanished terminal, a full disk, an ASCII locale.

What cannot be written there is lost, and the run goes on. Python would raise BrokenPipeError, EIO, ENOSPC or
UnicodeEncodeError from whatever `print` of whatever library came next.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

RULE = "could not be written in full"
_replaced: list[TextIO] = []
"""What was there before: a stream that nobody holds any more would close its descriptor."""


class _Unbreakable(io.RawIOBase):
    """Writes to a descriptor as long as that works. failure: why something is missing there."""

    def __init__(self, descriptor: int, closes: bool):
        self._descriptor, self._closes = descriptor, closes
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def write(self, data: object) -> int:
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(left)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:  # also EAGAIN, of a terminal that somebody made non-blocking
            self.failure = self.failure or error
        return size

    def close(self) -> None:
        if self._closes and not self.closed:
            super().close()
            os.close(self._descriptor)


def unbreakable(descriptor: int, like: TextIO | None = None, closes: bool = False) -> TextIO:
    """A text stream to a descriptor, in the encoding of another stream, line by line; what has no code is escaped.

    closes: the descriptor, when the stream is closed.
    """
    raw = _Unbreakable(descriptor, closes)
    encoding = getattr(like, "encoding", None) or "utf-8"
    return io.TextIOWrapper(  # type: ignore[type-var]
        io.BufferedWriter(raw),
        encoding,
        errors="backslashreplace",
        line_buffering=True,  # type: ignore[arg-type]
    )


def secure() -> None:
    """Make this process's standard streams unbreakable, and those that are closed (`>&-`) lead nowhere.

    A closed one would be the number of the next file that is opened, and get what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
            _replaced.append(stream)
    sys.stdout, sys.stderr = unbreakable(1, sys.stdout), unbreakable(2, sys.stderr)


def missing(stream: TextIO) -> OSError | None:
    """Why not everything could be written to a stream; None also where a reader (`| head`) has had enough."""
    failure = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "failure", None)
    return None if failure is None or failure.errno == errno.EPIPE else failure


def in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale would decide what names and texts are.

    Python 3.11 takes the encoding of arguments, names of files and what libraries open from the locale. With one of
    ASCII (`LC_ALL=C` and `PYTHONUTF8=0`) or Latin-1, a path with an accent could not be written into a UTF-8 file.
    Does not return where it starts again; the process stays the same one.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    environment = {**os.environ, "PYTHONUTF8": "1"}
    terminal = getattr(sys.stdout, "encoding", None) or "ascii"
    if terminal.lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968"):  # one that says nothing is of UTF-8 nowadays
        environment.setdefault("PYTHONIOENCODING", terminal)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
