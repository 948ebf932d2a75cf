"""Translation from Python to English out of the standard library: what a function does → what its docstring says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from recipes.data.functions import Function, FunctionSource, body, clip

SOURCE = 1200
"""Most characters of a function's body."""


class DocstringsSource(FunctionSource):
    """{"source": the body of a function, "target": the first line of its docstring}."""

    def contents(self, function: Function) -> Iterator[dict[str, Any]]:
        docstring = ast.get_docstring(function.node, clean=False) or ""
        target = docstring.partition("\n")[0].strip()
        source = clip(body(function), SOURCE) if target else ""
        if source.strip():
            yield {"source": source, "target": target}
