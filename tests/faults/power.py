"""What a disk holds after a loss of power, by what was done to it before (`disk.py` writes that down).

Nothing is promised but what POSIX does: the content of a file is on the disk once the file was synchronised, and the
names in a folder once the folder was. Of all else any part may be there, in any order: each change of names (a rename
is one), and each write, or half of it, or its length with zeros in place of its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from disk import Operation

DONE, LOST, HALF, ZEROS = "done", "lost", "half", "zeros"
Fate = Callable[[object], str]
"""What becomes of a change that was not synchronised; of a change of names only DONE or LOST count."""


@dataclass(eq=False)
class Write:
    """A write of `data` at an offset; without data the file is cut, or made longer, to it."""

    at: int
    data: bytes | None


@dataclass(eq=False)
class File:
    content: bytearray = field(default_factory=bytearray)
    waiting: list[Write] = field(default_factory=list)

    def after(self, fate: Fate) -> bytes:
        found = bytearray(self.content)
        for write in self.waiting:
            if (what := fate(write)) != LOST:
                _put(found, write, what)
        return bytes(found)


def _put(content: bytearray, write: Write, what: str = DONE) -> None:
    if write.data is None:
        del content[write.at :]
        content.extend(bytes(write.at - len(content)))
        return
    data = {DONE: write.data, HALF: write.data[: len(write.data) // 2], ZEROS: bytes(len(write.data))}[what]
    content.extend(bytes(max(0, write.at - len(content))))
    content[write.at : write.at + len(data)] = data


@dataclass(eq=False)
class Names:
    """Changes of names that happen together: (folder, name, what it is from then on)."""

    parts: list[tuple[Folder, str, File | Folder | None]]


@dataclass(eq=False)
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    kept: dict[str, File | Folder] = field(default_factory=dict)
    waiting: list[Names] = field(default_factory=list)

    def synchronise(self) -> None:
        for change in list(self.waiting):
            for folder, name, node in change.parts:
                _name(folder.kept, name, node)
                if change in folder.waiting:
                    folder.waiting.remove(change)

    def after(self, fate: Fate) -> dict[str, File | Folder]:
        found = dict(self.kept)
        for change in self.waiting:
            if fate(change) != LOST:
                for folder, name, node in change.parts:
                    if folder is self:
                        _name(found, name, node)
        return found


def _name(names: dict[str, File | Folder], name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


class Machine:
    """A disk below one folder, operation by operation."""

    def __init__(self) -> None:
        self.root = Folder()
        self._open: dict[int, File] = {}

    def do(self, operation: Operation) -> None:
        kind, path = operation.kind, operation.path
        if kind == "create":
            self._open[operation.inode] = node = File()
            self._change((path, node))
        elif kind == "mkdir":
            self._open.pop(operation.inode, None)  # a number of a file that is gone
            self._change((path, Folder()))
        elif kind == "unlink":
            self._change((path, None))
        elif kind == "rename":
            self._change((path, None), (operation.to, self._at(path)))
        elif kind == "sync":
            node = self._open.get(operation.inode) or self._at(path)
            if isinstance(node, Folder):
                node.synchronise()
            else:
                for write in node.waiting:
                    _put(node.content, write)
                node.waiting.clear()
        else:
            data = operation.data if kind == "write" else None
            if operation.inode not in self._open:  # from before the record
                self.do(replace(operation, kind="create"))
            self._open[operation.inode].waiting.append(Write(operation.at, data))

    def _change(self, *names: tuple[str, File | Folder | None]) -> None:
        places = [(self._at(path.rpartition("/")[0]), path.rpartition("/")[2], node) for path, node in names]
        change = Names([(folder, name, node) for folder, name, node in places if isinstance(folder, Folder)])
        for folder, name, node in change.parts:
            _name(folder.now, name, node)
        for folder in {id(folder): folder for folder, _, _ in change.parts}.values():
            folder.waiting.append(change)

    def _at(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for name in filter(None, path.split("/")):
            assert isinstance(node, Folder)
            node = node.now[name]
        return node

    def waiting(self) -> list[object]:
        """All that was not synchronised, as far as it can be reached by any name."""
        found: dict[int, object] = {}
        seen: set[int] = set()
        left: list[File | Folder] = [self.root]
        while left:
            node = left.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            found.update((id(change), change) for change in node.waiting)
            if isinstance(node, Folder):
                left += [*node.now.values(), *node.kept.values()]
                left += [part for change in node.waiting for _, _, part in change.parts if part is not None]
        return list(found.values())

    def files(self, fate: Fate) -> Iterator[tuple[str, bytes | None]]:
        """(path, content) of what is there after the loss; of a folder None."""

        def below(folder: Folder, path: str) -> Iterator[tuple[str, bytes | None]]:
            for name, node in sorted(folder.after(fate).items()):
                if isinstance(node, Folder):
                    yield f"{path}{name}", None
                    yield from below(node, f"{path}{name}/")
                else:
                    yield f"{path}{name}", node.after(fate)

        return below(self.root, "")


def put(files: Iterator[tuple[str, bytes | None]], target: Path) -> None:
    """Make these files and folders below `target`."""
    target.mkdir(parents=True)
    for path, content in files:
        if content is None:
            (target / path).mkdir()
        else:
            (target / path).write_bytes(content)
