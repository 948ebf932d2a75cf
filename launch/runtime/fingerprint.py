"""Whether all ranks do the same run: their configuration, code, data and model are compared before the first step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError
from conf.rules_values import shown
from conf.schema import Config

if TYPE_CHECKING:
    from launch.runtime.engine import Engine

ROOMS = ("conf", "recipes", "launch")
LIBRARIES = ("torch", "deepspeed", "transformers")


@cache
def code_digest() -> str:
    """SHA-256 of this repository's Python and YAML files."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((root / room).rglob("*")):
            if file.suffix in (".py", ".yaml", ".json") and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def compare(mine: dict[str, Any], what: str) -> None:
    """Raise RequestError, on all ranks, where a rank's facts are not those of another; a collective call.

    mine: plain values, nested; of what only some ranks have, those are compared. `what` names what they are of.
    """
    from torch import distributed as dist

    answers: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    told: dict[str, tuple[int, Any]] = {}
    problems = []
    for rank, answer in enumerate(answers):
        for key, value in _flat(answer):
            first, before = told.setdefault(key, (rank, value))
            if value != before:
                rule = f"on rank {rank}, and {shown(before)} on rank {first}"
                problems.append(Problem(key, shown(value), rule, f"the same {what} on every machine"))
    if problems:
        raise RequestError(problems)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def of_start(cfg: Config, data: str) -> dict[str, Any]:
    """What must be alike before the model is built. data: the fingerprint of the rows."""
    versions = {f"version of {name}": version(name) for name in LIBRARIES}
    return {**asdict(cfg), "code": code_digest(), **versions, "rows": data}


def parameters(engine: Engine) -> dict[str, int]:
    """Stage → number of values in this rank's part of the model, before tensor and data ranks divided it."""
    from launch.runtime.state import described

    counts = [math.prod(fact["shape"]) for fact in described(engine).values()]
    return {f"stage {engine.topology.place.pipeline}": sum(counts)}
