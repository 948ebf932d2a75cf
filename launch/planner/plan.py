"""One plan out of the planner's parts: plain values that print as a table and dump as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from conf.batch import Layout, batch_line
from conf.schema import Config
from launch.planner.communication import bytes_per_step, within_a_step
from launch.planner.flops import flops_per_row
from launch.planner.memory import Memory, memory
from launch.planner.model_shape import ModelShape
from launch.planner.schedule import (
    Instruction,
    Programs,
    bubble,
    in_flight,
    simulated_bubble,
    simulated_in_flight,
)
from recipes import counted


def make_plan(
    cfg: Config,
    layout: Layout,
    shape: ModelShape,
    engine: dict[str, Any],
    device: str,
    programs: Programs | None = None,
) -> dict[str, Any]:
    """Everything that is known before a run: sizes in bytes, counts in elements, FLOPs per optimizer step.

    programs: of folded pipelines; raises ValueError where the layout has one and they are not given.
    """
    steps, folded = cfg.batch.accumulation or 1, None
    if layout.stages > layout.pipeline:
        if programs is None:
            raise ValueError(f"parallel.schedule={layout.schedule} is planned from the engine's programs")
        folded = programs(layout, steps)
    stages = stage_plans(cfg, layout, shape, device, folded)
    costs = {
        stage: cost
        for place, part in enumerate(shape.parts)
        for stage, cost in zip(layout.stages_of(place), part.costs, strict=True)
    }
    in_order = [costs[stage] for stage in sorted(costs)]
    worst = max(stages, key=lambda stage: stage["bytes_per_rank"]["device"]["total"])
    busiest = max(stages, key=lambda stage: stage["bytes_sent_per_rank_and_step"]["total"])
    tokens = (cfg.batch.global_size or 0) * shape.seq_length
    return {
        "name": cfg.name,
        "device": device,
        "layout": asdict(layout),
        "batch": {**asdict(cfg.batch), "line": batch_line(cfg.batch, layout)},
        "model": {
            "parameters": shape.parameters,
            "embedding": shape.embedding,
            "head": shape.head,
            "layers": shape.layers,
            "tied": shape.tied,
            "precision": cfg.precision.name,
        },
        "tokens_per_step": tokens,
        "unit": counted(cfg),
        "flops_per_step": flops_per_row(shape) * (cfg.batch.global_size or 0),
        "bytes_per_rank": worst["bytes_per_rank"],
        "bytes_sent_per_rank_and_step": busiest["bytes_sent_per_rank_and_step"],
        "stages": stages,
        "bubble": simulated_bubble(folded, in_order) if folded else bubble(in_order, steps),
        "engine": engine,
    }


def stage_plans(
    cfg: Config, layout: Layout, shape: ModelShape, device: str, folded: Sequence[Sequence[Instruction]] | None
) -> list[dict[str, Any]]:
    """What the ranks at each place of the pipeline hold and send; one place without a pipeline."""
    total = sum(sum(part.costs) for part in shape.parts)
    stages = []
    for index, part in enumerate(shape.parts):
        waiting: float = in_flight(index, layout.pipeline, cfg.batch.accumulation or 1)
        if folded is not None:
            own = sum(part.costs) or 1.0
            shares = {s: cost / own for s, cost in zip(layout.stages_of(index), part.costs, strict=True)}
            waiting = simulated_in_flight(folded[index], shares)
        used = memory(part.shape, cfg, layout, device, waiting)
        sent = bytes_per_step(part.shape, cfg, layout) | within_a_step(part, shape, cfg, layout, index)
        stages.append(
            {
                "layers": [list(each) for each in part.layers],
                "parameters": part.shape.parameters,
                "share_of_work": sum(part.costs) / total if total else 1.0,
                "bytes_per_rank": _places(used, shape.activations is not None),
                "bytes_sent_per_rank_and_step": {**sent, "total": sum(sent.values())},
            }
        )
    return stages


def _places(used: Memory, activations_known: bool) -> dict[str, Any]:
    return {
        "device": {**used.device, "total": used.device_total},
        "host": {**used.host, "total": used.host_total},
        "nvme": {**used.nvme, "total": used.nvme_total},
        "activations_known": activations_known,
    }
