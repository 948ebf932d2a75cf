"""Classes of functions out of the standard library: which of its packages does a function belong to?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.data.changes import PASSED_OVER
from recipes.data.functions import Function, FunctionSource, clip, functions, without_imports
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import StdlibSource, held_out_row

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
"""The folders with the most functions (250 to 1,000) of those that every distribution of Python 3.11 to 3.13 has:
larger ones (idlelib, tkinter, lib2to3) are packaged apart or have gone."""
TEXT = 1200
"""Most characters of a function."""


class PackagesSource(FunctionSource):
    """{"text": a function without its decorators and imports, "label": its package}; the held-out split is by function,
    because the files of a package have little in common. A text that came before is left out and counted, or a row
    could be in both splits."""

    def files(self, held_out: bool) -> list[tuple[str, Path]]:
        """Those of the packages; `max_files` takes the first of each in turn, or only one package would be left."""
        everything = StdlibSource(self.config, self.key, self.held_out, None).files(held_out)
        seen: Counter[str] = Counter()
        ranked = []
        for name, path in everything:
            package = name.partition("/")[0]
            if package in PACKAGES:
                ranked.append((seen[package], name, path))
                seen[package] += 1
        return sorted((name, path) for _, name, path in sorted(ranked)[: self.max_files])

    def contents(self, function: Function) -> Iterator[dict[str, Any]]:
        yield {"text": clip(without_imports(function), TEXT), "label": function.file.partition("/")[0]}

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        seen: set[str] = set()
        for name, path in self.files(False):
            for function in functions(name, path, meter):
                for content in self.contents(function):
                    if content["text"] in seen:
                        meter.note(PASSED_OVER, "functions like an earlier one", f"{path}:{function.line}")
                        continue
                    yield Row(f"{path}:{function.line}", held_out_row(len(seen), self.held_out), content)
                    seen.add(content["text"])
            meter.done += path.stat().st_size
