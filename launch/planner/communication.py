"""Bytes that each rank sends per optimizer step, by collective.

Ring algorithms over d ranks: a reduce-scatter or an all-gather of M bytes sends M·(d-1)/d per rank, an all-reduce is
one after the other (Patarasuk & Yuan 2009; ZeRO, Rajbhandari et al. 2020, section 7). The ZeRO paper counts a
reduce-scatter for stages 1 and 2; DeepSpeed 0.19.8 does an all-reduce there (`use_multi_rank_bucket_allreduce`,
stage_1_and_2.py `average_tensor`), and stage 2 does it for every micro-batch. This module counts what the engine does.
"""

from __future__ import annotations

from conf.batch import Layout
from conf.schema import Config
from launch.planner.memory import element_bytes, persistent_parameters
from launch.planner.model_shape import ModelShape, Part


def all_reduce(size: float, ranks: int) -> float:
    """Bytes sent per rank for an all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) / ranks


def half_ring(size: float, ranks: int) -> float:
    """Bytes sent per rank for a reduce-scatter or an all-gather of `size` bytes in all."""
    return size * (ranks - 1) / ranks


def bytes_per_step(shape: ModelShape, cfg: Config, layout: Layout) -> dict[str, int]:
    """{collective: bytes sent per rank and optimizer step} over the replicas; empty for a single one."""
    ranks, zero = layout.replicas, cfg.zero
    if ranks == 1:
        return {}
    count, micro_batches = shape.parameters, cfg.batch.accumulation or 1
    weight = element_bytes(cfg.precision.name)
    gradient = element_bytes(cfg.precision.accumulation_dtype)
    if zero.stage == 0:
        parts = {"all-reduce gradients": all_reduce(count * gradient, ranks)}
    elif zero.stage < 3:
        reductions = micro_batches if zero.stage == 2 else 1
        parts = {
            "all-reduce gradients": reductions * all_reduce(count * gradient, ranks),
            "all-gather updated parameters": half_ring(count * weight, ranks),
        }
    else:
        parts = _stage3(shape, cfg, layout, weight, gradient)
    return {name: round(size) for name, size in parts.items()}


def _stage3(shape: ModelShape, cfg: Config, layout: Layout, weight: float, gradient: float) -> dict[str, float]:
    """Stage 3: parameters are gathered for forward and for backward of every micro-batch (ZeRO, section 7.2.2).

    ZeRO++ (Wang et al. 2023): qwZ sends forward's weights in 8 bits; hpZ gathers backward's within a node; qgZ sends
    gradients in 4 bits, twice (within and between nodes).
    """
    ranks, zero, micro_batches = layout.replicas, cfg.zero, cfg.batch.accumulation or 1
    whole = persistent_parameters(shape, zero.param_persistence_threshold)
    sharded = shape.parameters - whole
    forward = half_ring(sharded * (1 if zero.quantized_weights else weight), ranks)
    backward = half_ring(sharded * weight, zero.hpz_partition_size if zero.hpz_partition_size > 1 else ranks)
    muon = cfg.optimizer.name.lower() == "muon"  # runs without reduce-scatter (see ds_config)
    if zero.quantized_gradients:
        reduce_name, reduced = "all-to-all quantised gradients", 2 * half_ring(shape.parameters * 0.5, ranks)
    elif muon:
        reduce_name, reduced = "all-reduce gradients", all_reduce(shape.parameters * gradient, ranks)
    else:
        reduce_name, reduced = "reduce-scatter gradients", half_ring(shape.parameters * gradient, ranks)
    return {
        "all-gather parameters for forward": micro_batches * forward,
        "all-gather parameters for backward": micro_batches * backward,
        reduce_name: micro_batches * reduced,
        "all-gather small parameters": half_ring(whole * weight, ranks),
    }


def within_a_step(part: Part, shape: ModelShape, cfg: Config, layout: Layout, place: int) -> dict[str, int]:
    """{collective: bytes sent per rank and optimizer step} among tensor, sequence and pipeline ranks.

    part: what the rank at this place of the pipeline holds; shape: the whole model. An all-to-all of M bytes sends
    M·(r-1)/r per rank.
    """
    sequences = (cfg.batch.micro_size or 1) * (cfg.batch.accumulation or 1)
    weight = element_bytes(cfg.precision.name)
    tokens = sequences * shape.seq_length // layout.sequence
    forwards = 2 if cfg.train.activation_checkpointing == 1 else 1
    sent: dict[str, float] = {}
    if layout.tensor > 1:
        moved = part.traffic.forward * forwards + part.traffic.backward
        sent["tensor: all-reduce activations"] = all_reduce(moved * sequences, layout.tensor)
    if layout.sequence > 1:
        # Query and output of all heads, key and value of the key-value heads, there and back.
        heads = 2 * (shape.heads + max(shape.kv_heads, layout.sequence)) // layout.tensor
        exchanged = tokens * heads * shape.head_dim * weight * part.shape.layers
        sent["sequence: all-to-all heads"] = half_ring(exchanged * (forwards + 1), layout.sequence)
    if layout.pipeline > 1:
        # Hidden states onward, their gradients back; a rank that holds two stages in a row keeps them.
        own, last = layout.stages_of(place), layout.stages - 1
        onward = [
            stop for stage, (_, stop) in zip(own, part.layers, strict=True) if stage < last and stage + 1 not in own
        ]
        back = [start for stage, (start, _) in zip(own, part.layers, strict=True) if stage > 0 and stage - 1 not in own]
        kept = shape.activations
        entering = sum(kept.inputs[i] if kept else tokens * shape.hidden * weight // sequences for i in onward + back)
        divided = layout.tensor if layout.stages == layout.pipeline else 1  # in DualPipeV each tensor rank sends all
        sent["pipeline: hidden states"] = sequences * entering / divided
        if shape.tied and layout.loss_at != 0 and place in (0, layout.loss_at):
            copy = shape.vocab * shape.hidden / layout.tensor * element_bytes(cfg.precision.accumulation_dtype)
            sent["pipeline: tied embedding"] = all_reduce(copy, 2)
    return {name: round(size) for name, size in sent.items()}
