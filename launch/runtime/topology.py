"""The process groups of a layout: who shares a matrix, a sequence, a pipeline, a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import distributed as dist

from conf.batch import Layout, Place
from recipes.models.collectives import RankGroup


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout, and the ranks it works with.

    For the engine, the ranks of one sequence are data ranks like others: each has a loss of its own tokens, and the sum
    of their gradients is the gradient. Only attention knows that they share a sequence.
    """

    layout: Layout
    rank: int
    place: Place
    axes: PipeModelDataParallelTopology
    tensor: RankGroup | None
    sequence: RankGroup | None
    grid: Any
    """DeepSpeed's `mpu` for tensor parallelism without a pipeline, else None: a PipelineModule makes its own."""

    @property
    def has_loss(self) -> bool:
        """Whether this rank holds the pipeline's last stage."""
        return self.place.pipeline == self.layout.loss_at

    @property
    def counts(self) -> bool:
        """Whether this rank's loss and counts enter the sums: one rank of each data and sequence place does."""
        return self.place.tensor == 0 and self.has_loss


def topology(layout: Layout, rank: int) -> Topology:
    """Make the groups of `layout`; a collective call."""
    axes = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.replicas)
    tensor = _group(layout, rank, "tensor")
    sequence = _group(layout, rank, "sequence")
    grid = PipelineParallelGrid(topology=axes) if layout.tensor > 1 and layout.pipeline == 1 else None
    return Topology(layout, rank, layout.place(rank), axes, tensor, sequence, grid)


def _group(layout: Layout, rank: int, axis: str) -> RankGroup | None:
    """The ranks that differ from this one along `axis` only. Every rank makes every group, in the same order."""
    size = getattr(layout, axis)
    if size == 1:
        return None
    teams: dict[tuple, list[int]] = {}
    for other in range(layout.world):
        place = vars(layout.place(other))
        teams.setdefault(tuple(value for key, value in place.items() if key != axis), []).append(other)
    mine = None
    for ranks in teams.values():
        group = dist.new_group(ranks=ranks)
        if rank in ranks:
            mine = RankGroup(group, ranks.index(rank), size)
    return mine
