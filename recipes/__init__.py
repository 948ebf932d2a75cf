"""What is trained: one thin file per task, each a `Recipe`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.base import Recipe


def recipe_class(task: str) -> type[Recipe]:
    """The `Recipe` of module `recipes/<task>.py`."""
    return import_module(f"recipes.{task}").recipe
