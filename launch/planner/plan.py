"""One plan out of the planner's parts: plain values that print as a table and dump as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from conf.batch import Layout, batch_line
from conf.schema import Config
from launch.planner.communication import bytes_per_step
from launch.planner.flops import flops_per_token
from launch.planner.memory import memory
from launch.planner.model_shape import ModelShape


def make_plan(cfg: Config, layout: Layout, shape: ModelShape, engine: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything that is known before a run: sizes in bytes, counts in elements, FLOPs per optimizer step."""
    used = memory(shape, cfg, layout, cfg.data.seq_length, device)
    tokens = (cfg.batch.global_size or 0) * cfg.data.seq_length
    sent = bytes_per_step(shape, cfg, layout)
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
        "flops_per_step": flops_per_token(shape, cfg.data.seq_length) * tokens,
        "bytes_per_rank": {
            "device": {**used.device, "total": used.device_total},
            "host": {**used.host, "total": used.host_total},
            "nvme": {**used.nvme, "total": used.nvme_total},
            "activations_known": shape.activations is not None,
        },
        "bytes_sent_per_rank_and_step": {**sent, "total": sum(sent.values())},
        "engine": engine,
    }
