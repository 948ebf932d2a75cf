"""What is trained: one thin file per task, each a `Recipe`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.base import Recipe


def recipe_class(task: str) -> type[Recipe]:
    """The `Recipe` of module `recipes/<task>.py`."""
    return import_module(f"recipes.{task}").recipe


def counted(cfg: Any) -> str:
    """What `tokens` and `tokens_per_s` of a run count: tokens, images, or rows of numbers.

    cfg: a `Config`, or what config.yaml of a run directory holds.
    """
    if cfg.task == "image_classification":
        return "images"
    numbers = cfg.task == "regression" and (cfg.data.features or cfg.data.kind == "line")
    return "rows" if numbers else "tokens"
