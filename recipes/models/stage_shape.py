"""The shape of what one rank holds in a layout: a pipeline stage of a model whose matrices are divided.

The model on the meta device is divided by the very code that divides it for training, and then watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from conf.batch import Layout
from conf.schema import ParallelConfig
from recipes.models.collectives import RankGroup
from recipes.models.costs import layer_costs
from recipes.models.layouts import split
from recipes.models.plans import NoPlanError, pipeline_plan, token_table
from recipes.models.stages import is_tied, ranges
from recipes.models.tensor_parallel import shard, take_shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from recipes.models.shape import Activations, ModelShape


@dataclass(frozen=True)
class Traffic:
    """Bytes of one sequence that tensor ranks reduce or gather in one forward and one backward pass of a stage."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Part:
    """One place in the pipeline, as one of its tensor ranks sees it."""

    shape: ModelShape
    """Its own numbers: parameters of this rank, layers of its stages, `vocab` columns of the head (0 without one)."""
    layers: tuple[tuple[int, int], ...]
    """Of each of its stages, the first layer and the one after the last."""
    costs: tuple[float, ...]
    """Multiply-adds per token of each of its stages, all tensor ranks together."""
    traffic: Traffic


@dataclass(frozen=True)
class StagePlan:
    """Layers of each stage, and what the layers, the embedding and the head cost (`layer_costs`)."""

    stages: list[range]
    costs: tuple[list[float], float, float]


class Imagined(RankGroup):
    """Tensor ranks that are not there: the shapes of their collectives, and how many bytes these move."""

    def __init__(self, size: int):
        super().__init__(None, 0, size)
        self.moved: list[tuple[str, int]] = []
        self._seen: torch.Tensor | None = None

    def traffic(self) -> Traffic:
        """What was moved so far."""
        return Traffic(*(sum(size for way, size in self.moved if way == one) for one in ("forward", "backward")))

    def _note(self, direction: str, x: torch.Tensor) -> None:
        self.moved.append((direction, x.numel() * x.element_size()))

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self._seen:
            self._note("backward", x)
            self._seen = x
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self._note("forward", x)
        return x

    def gather(self, x: torch.Tensor, length: int) -> torch.Tensor:
        whole = x.new_empty(*x.shape[:-1], length)
        self._note("forward", whole)
        return whole

    def split(self, x: torch.Tensor) -> torch.Tensor:
        self._note("backward", x)
        return x[..., self.part(x.shape[-1])]


def divide_on_meta(network: PreTrainedModel, size: int) -> Imagined | None:
    """Give `network` the share of the first of `size` tensor ranks, the one with the most."""
    if size == 1:
        return None
    ranks = Imagined(size)
    shard(network, ranks)
    take_shares(list(network.parameters()), ranks)
    return ranks


def parts(
    network: PreTrainedModel, shape: ModelShape, activations: Activations | None, traffic: Traffic,
    plan: StagePlan, parallel: ParallelConfig,
) -> tuple[Part, ...]:  # fmt: skip
    """The places of a divided network's pipeline.

    `shape` is that of the whole model, `activations` and `traffic` are traced on the divided one, `plan` was made of
    the whole one.
    """
    per_layer, before, after = plan.costs
    layout = Layout.smallest(parallel)
    layer_sizes = shape.layer_parameters and [
        sum(p.numel() for p in layer.parameters()) for layer in model_layers(network, parallel)
    ]
    found = []
    for place in range(layout.pipeline):
        own = {stage: plan.stages[stage] for stage in layout.stages_of(place)}
        layers = [number for stage in own.values() for number in stage]
        first, last = 0 in own, layout.stages - 1 in own
        tensors = _all(network) if layout.pipeline == 1 else _held(network, layers, first, last)
        table, head = token_table(network), network.get_output_embeddings()
        has_table = table is not None and (first or (last and is_tied(network)))
        table_size = sum(p.numel() for p in table.parameters()) if table is not None and has_table else 0
        head_size = sum(p.numel() for p in head.parameters()) if head is not None and last and not shape.tied else 0
        local = replace(
            shape,
            parameters=sum(torch.Size(dimensions).numel() for _, dimensions in tensors),
            embedding=table_size,
            head=head_size,
            layers=len(layers),
            layer_parameters=tuple(layer_sizes[i] for i in layers) if layer_sizes else (),
            tensors=tensors,
            vocab=-(-shape.vocab // parallel.tensor) if last else 0,
            activations=activations
            and replace(
                activations,
                layers=tuple(activations.layers[i] for i in layers),
                inputs=tuple(activations.inputs[i] for i in layers),
                outside=activations.outside if first else 0,
            ),
        )
        costs = tuple(
            sum(per_layer[i] for i in numbers) + before * (stage == 0) + after * (stage == layout.stages - 1)
            for stage, numbers in own.items()
        )
        share = len(layers) / len(per_layer) if per_layer else 1.0
        moved = Traffic(round(traffic.forward * share), round(traffic.backward * share))
        spans = tuple((numbers.start, numbers.stop) for numbers in own.values())
        found.append(Part(local, spans, costs, moved))
    return tuple(found)


def model_layers(network: PreTrainedModel, parallel: ParallelConfig) -> list[torch.nn.Module]:
    """Those that stages are made of, else those that transformers can recompute; none where nobody names any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if found and parallel.pipeline == 1:
        return found
    try:
        return list(network.base_model.get_submodule(pipeline_plan(network).layers).children())
    except NoPlanError:
        return []


def _all(network: PreTrainedModel) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(p.shape)) for name, p in network.named_parameters())


def _held(
    network: PreTrainedModel, layers: Sequence[int], first: bool, last: bool
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of the parameters of a place in the pipeline."""
    plan, prefix = pipeline_plan(network), f"{network.base_model_prefix}."
    tied = is_tied(network)
    table = token_table(network)
    held = []
    for name, parameter in network.named_parameters():
        inside = name.removeprefix(prefix)
        if inside.startswith(f"{plan.layers}."):
            mine = int(inside.removeprefix(f"{plan.layers}.").split(".")[0]) in layers
        elif any(inside.startswith(f"{path}.") for path in plan.before):
            tied_copy = tied and last and table is not None and any(parameter is own for own in table.parameters())
            mine = first or tied_copy
        else:
            mine = last
        if mine:
            held.append((name, tuple(parameter.shape)))
    return tuple(held)


def stage_plan(network: PreTrainedModel, parallel: ParallelConfig) -> StagePlan:
    """The stages of a network that is still whole, which need not have a pipeline plan if they are one."""
    if parallel.pipeline > 1:
        return StagePlan(ranges(split(network, parallel)), layer_costs(network))
    costs = [float(sum(p.numel() for p in layer.parameters())) for layer in model_layers(network, parallel)]
    return StagePlan([range(len(costs))], (costs, 0.0, 0.0))
