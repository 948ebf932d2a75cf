"""Layout and batch arithmetic: world = data × tensor × pipeline × sequence, and the batch triangle over data ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import Problem, RequestError
from conf.schema import BatchConfig, ParallelConfig

MOST_CANDIDATES = 64
"""Divisors tried on each side of the triangle when looking for legal neighbours."""


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank in a layout, each counted from 0."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run are divided. The product of the four degrees is `world`."""

    world: int
    data: int
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    schedule: str = "1f1b"
    """Of the pipeline: 1f1b | dualpipev."""

    def __post_init__(self) -> None:
        if self.data * self.tensor * self.pipeline * self.sequence != self.world:
            raise ValueError(f"world {self.world} is not {self.factors()}")

    def factors(self) -> str:
        """`2 data × 1 tensor × 1 pipeline × 1 sequence`."""
        return f"{self.data} data × {self.tensor} tensor × {self.pipeline} pipeline × {self.sequence} sequence"

    @property
    def stages(self) -> int:
        """Stages of the pipeline: one on each of its ranks, or two in DualPipeV."""
        return 2 * self.pipeline if self.schedule == "dualpipev" and self.pipeline > 1 else self.pipeline

    def stages_of(self, pipeline: int) -> tuple[int, ...]:
        """Numbers of the stages that a rank at place `pipeline` holds; in DualPipeV the way leads out and back."""
        out, back = pipeline, self.stages - 1 - pipeline
        return (out,) if self.stages == self.pipeline else (out, back)

    @property
    def loss_at(self) -> int:
        """The place in the pipeline whose rank holds the last stage."""
        return next(p for p in range(self.pipeline) if self.stages - 1 in self.stages_of(p))

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters and average their gradients: data × sequence."""
        return self.data * self.sequence

    def place(self, rank: int) -> Place:
        """Where a rank stands. Neighbours share a matrix first, then a sequence, then a batch, then a pipeline.

        The order is that of DeepSpeed's `PipeModelDataParallelTopology`, with the sequence as part of its data axis.
        """
        rank, tensor = divmod(rank, self.tensor)
        rank, sequence = divmod(rank, self.sequence)
        pipeline, data = divmod(rank, self.data)
        return Place(pipeline, data, sequence, tensor)

    @classmethod
    def smallest(cls, parallel: ParallelConfig) -> Layout:
        """With one data rank."""
        return cls.of(parallel.tensor * parallel.pipeline * parallel.sequence, parallel)

    @classmethod
    def of(cls, world: int, parallel: ParallelConfig) -> Layout:
        """The layout of `world` ranks: the data degree is what the other three leave.

        Raises RequestError when a degree is not positive or their product does not divide the world.
        """
        wanted = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "sequence": parallel.sequence}
        wrong = [
            Problem(f"parallel.{axis}", str(degree), "a degree of parallelism is at least 1", f"parallel.{axis}=1")
            for axis, degree in wanted.items()
            if degree < 1
        ]
        if wrong:
            raise RequestError(wrong)
        each = math.prod(wanted.values())
        if world < each or world % each:
            largest = max(wanted, key=lambda axis: wanted[axis])
            rest = each // wanted[largest]
            fitting = [d for d in range(1, wanted[largest] + 1) if world % (rest * d) == 0] or [1]
            raise RequestError(
                Problem(
                    f"parallel.{largest}",
                    str(wanted[largest]),
                    f"the world is data × tensor × pipeline × sequence; {world} ranks cannot be divided into "
                    f"{parallel.tensor} tensor × {parallel.pipeline} pipeline × {parallel.sequence} sequence = {each}",
                    f"parallel.{largest}={fitting[-1]}, or a number of ranks that {each} divides: deepspeed --num_gpus "
                    f"{each} (of a plan: world_size={each})",
                )
            )
        return cls(world=world, data=world // each, **wanted, schedule=parallel.schedule)


def batch_line(batch: BatchConfig, layout: Layout) -> str:
    """`64 sequences = 4 micro × 8 accumulation × 2 data ranks`, for a resolved batch."""
    ranks = "data rank" if layout.data == 1 else "data ranks"
    return (
        f"{batch.global_size} sequences = {batch.micro_size} micro × {batch.accumulation} accumulation "
        f"× {layout.data} {ranks}"
    )


def resolve_batch(batch: BatchConfig, layout: Layout) -> BatchConfig:
    """All three of global_size, micro_size and accumulation from any two of them.

    Raises RequestError when fewer than two are given, when one is not positive, or when they do not multiply out with
    the data ranks; the nearest legal triples are in the error.
    """
    given = {
        key: value
        for key in ("global_size", "micro_size", "accumulation")
        if (value := getattr(batch, key)) is not None
    }
    wrong = [
        Problem(f"batch.{key}", str(value), "a batch is counted in whole sequences, at least 1", f"batch.{key}=1")
        for key, value in given.items()
        if value < 1
    ]
    if wrong:
        raise RequestError(wrong)
    if len(given) < 2:
        raise RequestError(_too_few(given, layout.data))
    # Where the division leaves a rest the third side is rounded down, so that the product differs and is refused below.
    micro = given.get("micro_size") or max(1, given["global_size"] // (given["accumulation"] * layout.data))
    steps = given.get("accumulation") or max(1, given["global_size"] // (micro * layout.data))
    size = given.get("global_size") or micro * steps * layout.data
    if micro * steps * layout.data != size:
        raise RequestError(_does_not_multiply(given, (size, micro, steps), layout))
    return BatchConfig(global_size=size, micro_size=micro, accumulation=steps)


def _too_few(given: dict[str, int], data: int) -> Problem:
    """What to add when at most one of the three is there."""
    rule = "any two of batch.global_size, batch.micro_size and batch.accumulation give the third; {} given"
    if not given:
        return Problem("batch", "", rule.format("none is"), f"batch.global_size={data} batch.micro_size=1")
    (key, value), *_ = given.items()
    add = {"global_size": "micro_size", "micro_size": "accumulation", "accumulation": "micro_size"}[key]
    number = 1
    if key == "global_size" and value % data == 0:
        number = max(d for d in _divisors(value // data) if d <= 8)
    return Problem(f"batch.{add}", "", rule.format(f"only batch.{key}={value} is"), f"batch.{add}={number}")


def _does_not_multiply(given: dict[str, int], asked: tuple[int, int, int], layout: Layout) -> Problem:
    """The refusal of a triangle that does not close, with the three nearest that do."""
    size, _, _ = asked
    written = " ".join(f"batch.{key}={value}" for key, value in given.items())
    ranks = f"{layout.data} data rank" + ("s" if layout.data > 1 else "")
    if size % layout.data and len(given) == 2:
        why = f"{size} sequences cannot be divided over {ranks}"
    else:
        units = {"micro_size": "micro", "accumulation": "accumulation"}
        factors = [f"{given[key]} {unit}" for key, unit in units.items() if key in given]
        product = math.prod(given.get(key, 1) for key in units) * layout.data
        verb = "is not" if len(given) == 3 else "is not a multiple of"
        why = f"{size} {verb} {' × '.join([*factors, ranks])} = {product}"
    nearest = [
        f"batch.global_size={g} batch.micro_size={m} batch.accumulation={a}"
        for g, m, a in nearest_triples(given, asked, layout.data)
    ]
    return Problem(written, "", f"global = micro × accumulation × data ranks, but {why}", "\n      or:  ".join(nearest))


def nearest_triples(
    given: dict[str, int], asked: tuple[int, int, int], data: int, count: int = 3
) -> list[tuple[int, int, int]]:
    """The `count` legal (global, micro, accumulation) nearest to what was asked.

    Near means: few given numbers changed, then a small sum of |log(new / asked)| over the three.
    """
    size, micro, steps = asked
    per_rank = max(1, round(size / data))
    sides = {per_rank, max(1, size // data), -(-size // data), micro * steps}
    micros = {micro, micro + 1, max(1, micro - 1), *(d for s in sides for d in _divisors(s)[:MOST_CANDIDATES])}
    found = set()
    for m in micros:
        for total in sides | {m * steps}:
            for a in {max(1, total // m), -(-total // m), steps + 1}:
                found.add((m * a * data, m, a))

    def distance(triple: tuple[int, int, int]) -> tuple[int, float, tuple[int, int, int]]:
        named = dict(zip(("global_size", "micro_size", "accumulation"), triple, strict=True))
        changed = sum(named[key] != value for key, value in given.items())
        return changed, sum(abs(math.log(new / old)) for new, old in zip(triple, asked, strict=True)), triple

    return sorted(found, key=distance)[:count]


def _divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def sizes(batch: BatchConfig) -> tuple[int, int, int]:
    """(global_size, micro_size, accumulation) of a batch that `resolve_batch` has completed."""
    if batch.global_size is None or batch.micro_size is None or batch.accumulation is None:
        raise ValueError(f"the batch triangle is not resolved: {batch}")
    return batch.global_size, batch.micro_size, batch.accumulation
