"""Questions about the standard library: what is the default of a parameter? The answer stands in the signature."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from recipes.data.functions import Function, FunctionSource, clip

CONTEXT = 1500
"""Most characters of a function that a question comes with."""
QUESTIONS = 3
"""Most questions about one function."""


class ParametersSource(FunctionSource):
    """Questions in the form of SQuAD: {"id", "question", "context", "answers": [{"text", "start"}]}, `start` being a
    character of the context."""

    def contents(self, function: Function) -> Iterator[dict[str, Any]]:
        context = clip(function.source, CONTEXT)
        asked = 0
        for parameter, default in defaults(function.node.args):
            if asked == QUESTIONS:
                return
            start, end = function.span(default)
            if end > len(context) or default.lineno != default.end_lineno:
                continue
            asked += 1
            yield {
                "id": f"{function.file}:{function.line}:{parameter}",
                "question": f"default of parameter {parameter} of function {function.node.name}?",
                "context": context,
                "answers": [{"text": context[start:end], "start": start}],
            }


def defaults(arguments: ast.arguments) -> list[tuple[str, ast.expr]]:
    """(parameter, default) of those that have one, in their order."""
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [
        *zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return [(parameter.arg, default) for parameter, default in pairs if default is not None]
