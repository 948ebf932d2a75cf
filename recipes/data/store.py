"""Folders that are either complete or not there: built by one process, opened by all, rebuilt when damaged.

An entry is written into a folder beside its place, synchronised and renamed. Its manifest lists every file with its
size and CRC-32 and has a checksum of its own, so an entry that was cut short or changed is noticed, and built again.
Ranks that start together build it once: a file lock lets one of them in, the others wait and then open what it has
written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes import durable
from recipes.checksums import crc32_of, is_sealed, seal

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
ROWS = "rows-"
"""Begins what identifies rows by their content, wherever they were read."""
PLACES = ("origin", "line")
"""Arrays (the ends of their files' names) of the file and line of each row."""


@dataclass(frozen=True)
class Entry:
    """A complete folder. facts: what its builder returned, JSON values. content: digest of what its arrays hold."""

    folder: Path
    facts: dict[str, Any]
    content: str

    def array(self, name: str, dtype: str) -> np.ndarray:
        """A flat array of the entry, memory-mapped and read-only."""
        path = self.folder / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, "r"))


class ArrayWriter:
    """Writes a flat array in parts, without ever holding it."""

    def __init__(self, path: Path, dtype: str):
        self._stack = ExitStack()
        self.file, self.dtype, self.count = self._stack.enter_context(durable.new_file(path)), np.dtype(dtype), 0

    def append(self, values: np.ndarray) -> None:
        """Add (n,) values; they are converted to the dtype of the array. Raises ValueError where it cannot hold one."""
        if self.dtype.kind in "iu" and len(values):
            bounds = np.iinfo(self.dtype)
            if values.min() < bounds.min or values.max() > bounds.max:
                raise ValueError(f"{values.min()} to {values.max()} in an array of {self.dtype}")
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.count += len(values)

    def close(self) -> None:
        self._stack.close()


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/deepspeed_recipes, or ~/.cache/deepspeed_recipes."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "deepspeed_recipes"


def entry(root: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry `name` below `root`; `build(folder)` writes its files and returns its facts when there is none yet.

    Raises RequestError when `root` cannot be written or the disk is full.
    """
    from filelock import FileLock

    folder = root / name
    found = _open(folder)
    if found is not None:
        return found
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        rule = "another user's, and readable for that one alone"
        nearest = "data.cache_dir=FOLDER of your own, or one that is shared with umask 002"
        raise RequestError(Problem("data.cache_dir", str(folder), rule, nearest))
    with _writable(root):
        durable.make_folder(root)
        lock = FileLock(root / f"{name}.lock")
        lock.acquire()
    try:
        found = _open(folder)  # another process may have built it while this one waited
        if found is not None:
            return found
        with _writable(root):
            for stale in [folder, *root.glob(f"{PARTIAL}{name}-*")]:
                durable.remove(stale)
            partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{name}-", dir=root))
        try:
            facts = build(partial)
            with _writable(root):
                share(partial)
                content = _content(partial)
                _finish(partial, facts, content)
                durable.publish(partial, folder)
        except BaseException:
            durable.remove(partial)
            raise
    finally:
        lock.release()
    return Entry(folder, facts, content)


def share(folder: Path) -> None:
    """Give a folder and what is in it the permissions that the umask leaves; some writers leave the owner's alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failing write below an entry's folder `path` into a RequestError about the cache folder."""
    with _writable(path.parent):
        yield


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        with durable.of_the_system(root):
            yield
    except OSError as error:
        rule = f"tokenised data cannot be written there ({error.strerror or error})"
        raise RequestError(Problem("data.cache_dir", str(root), rule, "data.cache_dir=FOLDER")) from error


def _open(folder: Path) -> Entry | None:
    """The entry, or None when it is not there or its files are not what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        complete = is_sealed(manifest) and all(
            (folder / name).stat().st_size == size and crc32_of(folder / name) == checksum
            for name, (size, checksum) in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return Entry(folder, manifest["facts"], manifest["content"]) if complete else None


def _content(folder: Path) -> str:
    """A digest of an entry's files, but for those that say where rows came from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.name != MANIFEST and path.is_file()):
        if path.suffix[1:] not in PLACES:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()[:16]


def _finish(folder: Path, facts: dict[str, Any], content: str) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, crc32_of(path)) for path in paths}
    manifest = json.dumps(seal({"files": files, "facts": facts, "content": content}), indent=2)
    durable.replace_text(folder / MANIFEST, manifest)
