"""What a value in a file is, in the words of JSON, and whether it is a text."""

from __future__ import annotations

from typing import Any


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
