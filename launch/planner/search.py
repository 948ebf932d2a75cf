"""All layouts of a world size: the legal ones with their predicted time, the others with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conf.batch import Layout, resolve_batch, sizes
from conf.environment import Environment
from conf.errors import Problem, RequestError
from conf.rules import check
from conf.schema import PIPELINE_SCHEDULES, BatchConfig, Config, ParallelConfig
from launch.planner.model_shape import ModelShape
from launch.planner.plan import make_plan
from launch.planner.schedule import Programs

ASSUMED = {"cuda": (4e14, 2e11), "cpu": (1e11, 2e9)}
"""(FLOP/s, bytes/s) of one rank when nobody says: 40% of an H100's bf16 peak over NVLink; a core over shared memory."""

ShapeOf = Callable[[Config], ModelShape]
"""The shape of the model that a run trains, as it divides it. Raises RequestError where the model itself forbids it."""


@dataclass(frozen=True)
class Candidate:
    """One layout: a plan with `seconds` per step, or the reasons why it is illegal."""

    layout: Layout
    seconds: float | None
    plan: dict[str, Any] | None
    why_not: tuple[str, ...] = ()


def layouts(world: int) -> Iterator[Layout]:
    """Every way to write `world` as data × tensor × pipeline × sequence, a pipeline in each of its schedules."""
    for tensor in _divisors(world):
        for pipeline in _divisors(world // tensor):
            for sequence in _divisors(world // tensor // pipeline):
                data = world // tensor // pipeline // sequence
                for schedule in PIPELINE_SCHEDULES if pipeline > 1 else PIPELINE_SCHEDULES[:1]:
                    yield Layout(world, data, tensor, pipeline, sequence, schedule)


def search(
    cfg: Config, world: int, environment: Environment, shape_of: ShapeOf, programs: Programs,
    device: str, rate: float, bandwidth: float,
) -> list[Candidate]:  # fmt: skip
    """Candidates, the fastest first, then the illegal ones.

    The global batch stays; the micro batch too where it can. Predicted: arithmetic at `rate` FLOP/s per rank,
    stretched by the bubble, and after it the busiest rank's bytes at `bandwidth`, as if nothing overlapped.
    """
    found = [
        _candidate(cfg, layout, environment, shape_of, programs, device, rate, bandwidth) for layout in layouts(world)
    ]
    return sorted(found, key=lambda candidate: (candidate.seconds is None, candidate.seconds or 0.0))


def _candidate(
    cfg: Config, layout: Layout, environment: Environment, shape_of: ShapeOf, programs: Programs,
    device: str, rate: float, bandwidth: float,
) -> Candidate:  # fmt: skip
    trial = copy.deepcopy(cfg)
    trial.parallel = ParallelConfig(layout.tensor, layout.pipeline, layout.sequence, schedule=layout.schedule)
    size, micro, _ = sizes(cfg.batch)
    try:
        fitting = [m for m in range(min(micro, size), 0, -1) if size % (m * layout.data) == 0]
        folded = [m for m in fitting if size // (m * layout.data) >= layout.stages > layout.pipeline]
        micro = next(iter(folded or fitting), micro)
        trial.batch = resolve_batch(BatchConfig(size, micro, None), layout)
        wrong = check(trial, layout, environment)
        shape = shape_of(trial) if not wrong else None
    except RequestError as error:
        wrong, shape = error.problems, None
    if shape is None:
        return Candidate(layout, None, None, tuple(_why(problem) for problem in wrong))
    plan = make_plan(trial, layout, shape, {}, device, programs)
    arithmetic = plan["flops_per_step"] / layout.world / rate / (1.0 - plan["bubble"])
    sent = plan["bytes_sent_per_rank_and_step"]["total"] / bandwidth
    return Candidate(layout, arithmetic + sent, plan)


def _why(problem: Problem) -> str:
    about_layout = problem.key.startswith(("parallel.", "zero."))
    return problem.rule if about_layout else str(problem).splitlines()[0]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
