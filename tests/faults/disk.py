"""A disk whose operations fail, or are written down, for the processes of a job (`disk.cpp`)."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.server import Server

SHORT = 0
"""In the place of an errno: a write takes half of what it is given, and what follows finds no room."""
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EMFILE": errno.EMFILE, "short": SHORT}
RECORD, NAMES = "disk.record", "disk_{}.names"


@dataclass(frozen=True)
class Disk:
    """What the disk below a job's folder does to one rank. first, count: the operations that fail, from 1.

    code: of ERRORS. record: all ranks write down what they do instead. reads: reading counts too.
    """

    rank: int = 0
    first: int = 0
    count: int = 1
    code: int = errno.ENOSPC
    record: bool = False
    reads: bool = True


@cache
def server() -> Server:
    """Forked processes that this disk stands below; compiled once. Raises CalledProcessError without a compiler."""
    library = Path(tempfile.mkdtemp(prefix="disk_")) / "disk.so"
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX", "c++")
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(words, check=True)
    return Server("DISK", ["support.preloaded"], HF_HUB_OFFLINE="1", LD_PRELOAD=str(library))


def arm(disk: Disk, folder: Path, notes: Path, rank: int) -> None:
    """Let the disk below `folder` be as said, in this process. notes: a folder elsewhere, for what it writes down."""
    notes.mkdir(exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    recording = os.open(notes / RECORD, flags) if disk.record else -1
    naming = os.open(notes / NAMES.format(rank), flags | os.O_TRUNC)
    failing = disk.rank == rank and disk.first > 0
    first, last = (disk.first, disk.first + disk.count - 1) if failing else (0, -1)
    if not disk.record:
        folder /= "run"  # what a run says goes to files beside it, which stand for its terminal
    library = ctypes.CDLL(None)
    library.arm(
        str(folder).encode(), ctypes.c_long(first), ctypes.c_long(last), disk.code, recording, naming, int(disk.reads)
    )


def operations(notes: Path, rank: int) -> list[tuple[str, str]]:
    """(operation, path below the folder) of all operations of a rank, in order."""
    lines = (notes / NAMES.format(rank)).read_text(encoding="utf-8", errors="replace").splitlines()
    return [(name, path) for _, name, path in (line.split("\t") for line in lines)]


def kinds(notes: Path, rank: int) -> Counter[str]:
    return Counter(name for name, _ in operations(notes, rank))


@dataclass(frozen=True)
class Operation:
    """kind: create, write, truncate, sync, rename, mkdir or unlink. path, to: below the folder. at: offset or size."""

    kind: str
    path: str
    to: str
    inode: int
    at: int
    data: bytes


def recorded(notes: Path) -> Iterator[Operation]:
    """What was done to the disk, by all ranks, in order."""
    with (notes / RECORD).open("rb") as file:
        while line := file.readline():
            kind, path, to, inode, at, size = line.decode().rstrip("\n").split("\t")
            yield Operation(kind, path, to, int(inode), int(at), file.read(int(size)))
