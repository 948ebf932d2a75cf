"""No text is read or written in an encoding that the machine's locale chooses: every call says which one.

ruff's own rule for this (PLW1514, in preview) follows only variables whose type it can infer, so most paths escape it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for room in ("conf", "recipes", "launch", "benchmarks") for file in (ROOT / room).rglob("*.py"))
BINARY = {"os", "Image", "tokenize", "tarfile", "zipfile"}
"""Modules whose `open` takes no encoding, or finds it itself."""
BYTES_BY_DEFAULT = {"gzip", "lzma", "bz2"}


def without_encoding(source: str) -> Iterator[int]:
    """Lines of calls that open or run something as text without saying in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _as_text(node) and not any(word.arg == "encoding" for word in node.keywords):
            yield node.lineno


def _as_text(call: ast.Call) -> bool:
    function, given = call.func, {word.arg: word.value for word in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "") if isinstance(function, ast.Attribute) else None
    if name in ("read_text", "write_text"):
        return len(call.args) == (0 if name == "read_text" else 1)
    if any(isinstance(value := given.get(key), ast.Constant) and value.value for key in ("text", "universal_newlines")):
        return True
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile") or (owner in BINARY and name == "open"):
        return False
    place = 0 if name.endswith("TemporaryFile") or (owner is not None and owner not in BYTES_BY_DEFAULT | {"os"}) else 1
    mode = call.args[place] if len(call.args) > place else given.get("mode")
    if mode is None:
        return not name.endswith("TemporaryFile") and owner not in BYTES_BY_DEFAULT
    words = [part.value for part in ast.walk(mode) if isinstance(part, ast.Constant)]
    return all(
        isinstance(word, str) and ("t" in word if owner in BYTES_BY_DEFAULT else "b" not in word) for word in words
    )


@pytest.mark.parametrize("source, found", [
    ("open(path)", True), ("open(path, 'rb')", False), ("path.open()", True), ("path.open('a')", True),
    ("path.open('wb')", False), ("path.open(encoding='utf-8')", False), ("os.open(path, os.O_RDONLY)", False),
    ("os.fdopen(1, 'w')", True), ("os.fdopen(1, 'wb')", False), ("path.read_text()", True),
    ("path.read_text('utf-8')", False), ("path.write_text(text)", True), ("path.write_text(text, 'utf-8')", False),
    ("subprocess.run(words, text=True)", True), ("subprocess.run(words, text=True, encoding='utf-8')", False),
    ("subprocess.run(words)", False), ("gzip.open(path)", False), ("gzip.open(path, 'rt')", True),
    ("NamedTemporaryFile()", False), ("NamedTemporaryFile('w')", True), ("Image.open(path)", False),
])  # fmt: skip
def test_the_rule_sees_what_it_should(source, found):
    assert bool(list(without_encoding(source))) == found


def test_every_text_names_its_encoding():
    lines = [f"{file.relative_to(ROOT)}:{n}" for file in FILES for n in without_encoding(file.read_text("utf-8"))]
    assert not lines, f"the locale decides here, say encoding=: {', '.join(lines)}"
