"""What a value in a file is, in the words of JSON, and whether it is a text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_/.…][a-z0-9_/.…-]*", re.IGNORECASE | re.ASCII)
"""Values that mean themselves to Hydra and to shells."""


def assigned(key: str, value: str | Iterable[str]) -> str:
    """An override as it has to be typed, for advice: `data.label=class`, `"data.label=' class'"`; of several: a list.

    Quotes for Hydra, which would take a space off and end a value at a comma, are inside those for the shell.
    """
    names = [value] if isinstance(value, str) else list(value)
    written = [name if PLAIN.fullmatch(name) else _quoted(name) for name in names]
    override = f"{key}={written[0]}" if isinstance(value, str) else f"{key}=[{','.join(written)}]"
    if written == names:
        return override
    return '"' + re.sub(r'([\\"$`])', r"\\\1", override) + '"'


def _quoted(value: str) -> str:
    """As Hydra reads it: a backslash is one, but before a quotation mark."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def wrong_text(value: Any) -> str:
    """Why a value is no text that a tokenizer takes; empty when it is. JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return f"must be a string, it is {kind_of(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair at character {error.start + 1}, which is no text"
    return ""


def kind_of(value: Any) -> str:
    """The type of a value in the words of JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return names.get(type(value), type(value).__name__)
