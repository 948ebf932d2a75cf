"""Functions of the standard library, from which three tasks make rows that need neither a file nor a network."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem
from recipes.data.changes import DROPPED
from recipes.data.readers import read_python
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import StdlibSource, _hash, held_out_files

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method.

    file: relative path of its file. line: of its `def`, counted from 1. source: from `def` on, without decorators,
    dedented. cut: characters of indentation taken off each line of `source`.
    """

    file: str
    path: Path
    line: int
    node: Definition
    source: str
    cut: tuple[int, ...]

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """(start, end) of a node of this function in `source`, in characters."""
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        return self._offset(node.lineno, node.col_offset), self._offset(end_line, end_column)

    def _offset(self, line: int, column: int) -> int:
        """Where (line, column) of the file is in `source`; `ast` counts columns in bytes of UTF-8."""
        index = line - self.line
        lines = self.source.split("\n")
        inside = lines[index].encode()[: column - self.cut[index]].decode()
        return sum(len(text) + 1 for text in lines[:index]) + len(inside)


def functions(name: str, path: Path, meter: Meter) -> Iterator[Function]:
    """Functions and methods of a file, in its order; one inside another function is a part of that one's source.

    name: relative path of the file. Files that do not decode or parse are counted in `meter`.
    """
    text = read_python(path)
    if text is None:
        meter.note(DROPPED, "files that do not decode", str(path))
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last three: null bytes, nested too deeply
        meter.note(DROPPED, "files that do not parse", str(path))
        return
    lines = text.split("\n")  # not splitlines: a form feed ends no line for `ast`
    for node in _definitions(tree):
        dedented, cut = _dedent(lines[node.lineno - 1 : node.end_lineno], node.col_offset)
        yield Function(name, path, node.lineno, node, "\n".join(dedented), cut)


def _definitions(node: ast.AST) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(child)


def _dedent(lines: list[str], width: int) -> tuple[list[str], tuple[int, ...]]:
    """(lines without their first `width` blanks, blanks taken off each). `textwrap.dedent` would stop at strings and
    brackets whose lines are indented less than the code around them."""
    cut = tuple(min(width, len(line) - len(line.lstrip(" \t\f"))) for line in lines)
    return [line[count:] for line, count in zip(lines, cut, strict=True)], cut


def body(function: Function) -> str:
    """What follows the docstring of a function that has one, dedented; empty when nothing does."""
    docstring, *rest = function.node.body
    last = docstring.end_lineno or docstring.lineno
    if not rest or rest[0].lineno == last:  # `"…"; return 1` on the line of the docstring
        return ""
    lines = function.source.split("\n")[last + 1 - function.line :]
    return "\n".join(_dedent(lines, rest[0].col_offset - function.node.col_offset)[0]).strip("\n")


def without_imports(function: Function) -> str:
    """The source without its import statements and the lines that held nothing else."""
    source = function.source
    imports = [node for node in ast.walk(function.node) if isinstance(node, ast.Import | ast.ImportFrom)]
    for start, end in sorted(map(function.span, imports), reverse=True):
        head, tail = source[:start], source[end:]
        blank, (rest, newline, after) = head.rpartition("\n")[2], tail.partition("\n")
        if not blank.strip() and (not rest.strip() or rest.lstrip().startswith("#")):
            head, tail = head[: len(head) - len(blank)], after
            if not newline:
                head = head.removesuffix("\n")
        source = head + tail
    return source


def clip(text: str, limit: int) -> str:
    """The first whole lines of a text, at most `limit` characters."""
    if len(text) <= limit:
        return text
    end = text.rfind("\n", 0, limit + 1)
    return text[:end] if end > 0 else text[:limit]


class FunctionSource(StdlibSource):
    """Rows made of the functions of the standard library; the held-out split is by file."""

    def contents(self, function: Function) -> Iterator[dict[str, Any]]:
        """The rows that one function gives: any number."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The files are those of other tasks, the rows are not."""
        return f"{type(self).__name__} {super().fingerprint()}"

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        files = self.files(False)
        set_aside = self._set_aside(files)
        if not set_aside:
            rule = "fewer than two of these files of the standard library give a row, one is held out"
            value = "" if self.max_files is None else str(self.max_files)
            problems.add(Problem(f"{self.key}.max_files", value, rule, f"{self.key}.max_files=null"))
            return
        for name, path in files:
            for function in functions(name, path, meter):
                for content in self.contents(function):
                    yield Row(f"{path}:{function.line}", name in set_aside, content)
            meter.done += path.stat().st_size

    def _set_aside(self, files: list[tuple[str, Path]]) -> set[str]:
        """`held_out_files`, where neither split may be left with files that give no row; empty if there is no way."""

        def gives(file: tuple[str, Path]) -> bool:
            return any(True for function in functions(*file, Meter()) for _ in self.contents(function))

        ranked = sorted(files, key=lambda file: _hash(file[0]))
        while ranked and not gives(ranked[0]):
            ranked.pop(0)
        while ranked and not gives(ranked[-1]):
            ranked.pop()
        return held_out_files([name for name, _ in ranked], self.held_out) if len(ranked) > 1 else set()
