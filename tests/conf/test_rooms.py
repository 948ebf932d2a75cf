"""The rooms import one way (conf ← recipes ← launch), only launch knows the engine, and some never load torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"conf": (), "recipes": ("conf",), "launch": ("conf", "recipes")}
"""Room → the rooms it may import besides itself."""


def imports(source: str) -> Iterator[str]:
    """Every imported module name, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            yield "."


def violations(room: str, source: str, below: str = "") -> set[str]:
    """The top-level packages that a file of `room` imports and must not."""
    names = {name.split(".")[0] for name in imports(source)}
    forbidden = {other for other in (*ROOMS, "tests") if other not in (room, *ROOMS[room])}
    if room != "launch":
        forbidden |= {"deepspeed"}
    if room == "conf" or below.startswith("planner"):
        forbidden |= {"torch", "transformers", "deepspeed", "datasets", "numpy"}
    if below.startswith("planner"):
        forbidden -= {"transformers"}  # where a hub or local config has to be read; never the weights
    return names & forbidden


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in files
        if (wrong := violations(room, file.read_text(), file.relative_to(ROOT / room).as_posix()))
    }
    assert found == {}


def test_the_check_sees_every_kind_of_import():
    assert violations("conf", "def f():\n    import torch.nn as nn") == {"torch"}
    assert violations("conf", "from recipes.base import Recipe") == {"recipes"}
    assert violations("recipes", "if 1:\n    from deepspeed import zero") == {"deepspeed"}
    assert violations("recipes", "import launch.runtime") == {"launch"}
    assert violations("recipes", "import torch\nfrom conf.schema import Config") == set()
    assert violations("launch", "import torch", "planner/memory.py") == {"torch"}
    assert violations("launch", "import torch, deepspeed", "runtime/engine.py") == set()
