"""Bytes per rank, by part. What stays, what one step adds, and where it lies: on the device, in host memory, on NVMe.

Parameters, gradients and optimizer state follow ZeRO (Rajbhandari et al. 2020, section 5) with the copies that
DeepSpeed 0.19.8 really keeps; each branch names the file.
Activations come from the model itself (`ModelShape.activations`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.batch import Layout
from conf.schema import Config, OptimizerConfig
from launch.planner.model_shape import ModelShape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16_autocast": 4}
FP32 = 4

STATES = {
    "adam": 2, "adamw": 2, "lamb": 2, "nadam": 2, "radam": 2, "adamax": 2, "adadelta": 2, "rprop": 2,
    "adagrad": 1, "lion": 1, "rmsprop": 1, "asgd": 1, "sgd": 0, "muon": 2, "adafactor": 0,
}  # fmt: skip
"""fp32 numbers per parameter that each optimizer keeps, momentum of sgd and rmsprop aside (see `optimizer_numbers`)."""

LOSS_CHUNK, LOSS_POSITIONS = 2**21, 512
"""Logits at hand at once with `train.fused_loss`: elements, but those of so many positions at least
(recipes/models/loss.py CHUNK_ELEMENTS, CHUNK_POSITIONS)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one with the most. `activations` is 0 when the model could not be traced."""

    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def nvme_total(self) -> int:
        return sum(self.nvme.values())


def element_bytes(name: str) -> int:
    """Bytes of one parameter of a precision, or of one number of a dtype name."""
    return BYTES[name]


def persistent_parameters(shape: ModelShape, threshold: int) -> int:
    """Elements in tensors below stage 3's persistence threshold: whole on every rank, never gathered."""
    sizes = (math.prod(dimensions) for _, dimensions in shape.tensors)
    return sum(size for size in sizes if size < threshold)


def optimizer_numbers(shape: ModelShape, optimizer: OptimizerConfig) -> int:
    """fp32 numbers of optimizer state for the whole model, the master copy of the weights not included.

    Muon keeps a momentum for matrices and Adam's two numbers for the rest; embedding and head count as rest, by name as
    in DeepSpeed 0.19.8 (`deepspeed/__init__.py`, set_optimizer_flags).
    """
    name = optimizer.name.lower()
    if name == "muon":
        matrices = sum(
            math.prod(dimensions)
            for tensor, dimensions in shape.tensors
            if len(dimensions) >= 2 and not any(word in tensor.lower() for word in ("embed", "lm_head"))
        )
        return matrices + 2 * (shape.parameters - matrices)
    numbers = STATES[name]
    if name in ("sgd", "rmsprop") and optimizer.momentum:
        numbers += 1
    return numbers * shape.parameters


def memory(shape: ModelShape, cfg: Config, layout: Layout, device: str, in_flight: float = 1) -> Memory:
    """The bytes of one rank while it trains on `device` (cpu | cuda); everything at its largest at once.

    shape: of what this rank holds. in_flight: micro-batches whose activations it keeps at the same time.
    """
    zero, ranks = cfg.zero, layout.replicas
    weights = _parameters(shape, cfg, ranks)
    states = _optimizer_state(shape, cfg, ranks)
    on_device = {
        "parameters": weights,
        "gradients": _gradients(shape, cfg, ranks),
        "optimizer state": states,
        "engine buffers": _buffers(shape, cfg, ranks, device),
        "activations": _activations(shape, cfg, in_flight),
        "logits and loss": _logits(shape, cfg, shape.seq_length // layout.sequence) if shape.vocab else 0,
    }
    elsewhere: dict[str, dict[str, int]] = {"cpu": {}, "nvme": {}}
    if zero.offload_optimizer != "none":
        on_device["optimizer state"] = 0
        elsewhere[zero.offload_optimizer]["optimizer state"] = states
        # The step runs on the host, on an fp32 copy of this rank's gradients.
        elsewhere["cpu"]["gradients"] = math.ceil(shape.parameters / ranks) * FP32
    if zero.offload_param != "none":
        whole = persistent_parameters(shape, zero.param_persistence_threshold) * BYTES[cfg.precision.name]
        on_device["parameters"] = whole
        elsewhere[zero.offload_param]["parameters"] = weights - whole
    return Memory(on_device, elsewhere["cpu"], elsewhere["nvme"])


def _parameters(shape: ModelShape, cfg: Config, ranks: int) -> int:
    size = BYTES[cfg.precision.name]
    if cfg.zero.stage < 3:
        return shape.parameters * size
    whole = persistent_parameters(shape, cfg.zero.param_persistence_threshold)
    return (whole + math.ceil((shape.parameters - whole) / ranks)) * size


def _gradients(shape: ModelShape, cfg: Config, ranks: int) -> int:
    """Gradients from backward to the step, with the fp32 copy that the step works on."""
    count, share = shape.parameters, math.ceil(shape.parameters / ranks)
    weight, kept = BYTES[cfg.precision.name], BYTES[cfg.precision.accumulation_dtype]
    if cfg.zero.stage == 0:
        # fp16/unfused_optimizer.py: the step makes an fp32 copy of all low-precision gradients.
        return count * weight + (count * FP32 if weight < FP32 else 0)
    if cfg.zero.stage == 1:
        if cfg.precision.name == "bf16" and kept == FP32 and cfg.zero.offload_optimizer == "none":
            # bf16_optimizer.py: a whole fp32 buffer, filled from the bf16 gradients after each backward.
            return count * (weight + FP32)
        # stage_1_and_2.py: whole gradients until the boundary, then this rank's share in fp32.
        return count * kept + share * FP32
    # Stages 2 and 3 keep this rank's share only; in another dtype than fp32 the step adds an fp32 copy. Stage 2 makes
    # one in any case (stage_1_and_2.py `step`: flatten), stage 3 steps on its own buffer.
    copies = FP32 if kept < FP32 or cfg.zero.stage == 2 else 0
    return share * (kept + copies)


def _optimizer_state(shape: ModelShape, cfg: Config, ranks: int) -> int:
    zero, low = cfg.zero, BYTES[cfg.precision.name] < FP32
    ranks = ranks if zero.stage else 1
    states = math.ceil(optimizer_numbers(shape, cfg.optimizer) / ranks) * FP32
    # Stages 1 and 2 clone an fp32 master share even of fp32 parameters (stage_1_and_2.py,
    # single_partition_of_fp32_groups); stage 3 steps on fp32 parameters in place unless the step is offloaded
    # (stage3.py, fp32_partitioned_groups_flat).
    master = low or zero.stage in (1, 2) or zero.offload_optimizer != "none"
    return states + (math.ceil(shape.parameters / ranks) * FP32 if master else 0)


def _buffers(shape: ModelShape, cfg: Config, ranks: int, device: str) -> int:
    """The engine's own buffers for reducing and gathering.

    Reduce buckets are allocated at their full size however small the model is (stage_1_and_2.py setup_buckets,
    stage3.py). A CPU maps pages only when they are touched, so there they cost at most a model.
    """
    zero = cfg.zero
    weight, kept = BYTES[cfg.precision.name], BYTES[cfg.precision.accumulation_dtype]
    if zero.stage == 0 or (zero.stage == 1 and cfg.precision.name == "bf16" and kept == FP32):
        return 0
    elements = zero.reduce_bucket_size if device == "cuda" else min(zero.reduce_bucket_size, shape.parameters)
    if zero.stage < 3:
        copies = 2 if zero.overlap_comm else 1
        return elements * copies * (kept if zero.stage == 1 else weight)
    # What is gathered: the largest unit in use (a layer, the embedding or the head) and what is fetched ahead of it.
    largest = max([*shape.layer_parameters, shape.embedding, shape.head])
    gathered = min(shape.parameters, largest + zero.prefetch_bucket_size) if ranks > 1 else 0
    return elements * kept + gathered * weight


def _activations(shape: ModelShape, cfg: Config, in_flight: float) -> int:
    """What backward needs of the micro-batches in flight; each n-th layer leaves its input only and is recomputed."""
    kept, every = shape.activations, cfg.train.activation_checkpointing
    if kept is None:
        return 0
    total, recomputed = kept.outside, 0
    for index, layer in enumerate(kept.layers):
        if every and index % every == 0:
            total += kept.inputs[index]
            recomputed = max(recomputed, layer)
        else:
            total += layer
    if cfg.precision.name == "bf16_autocast":
        # Autocast keeps a bf16 copy of each matrix that it multiplied with.
        recomputed += 2 * sum(math.prod(d) for name, d in shape.tensors if len(d) >= 2 and "embed" not in name.lower())
    return (math.ceil(total * in_flight) + recomputed) * (cfg.batch.micro_size or 1)


def _logits(shape: ModelShape, cfg: Config, seq_length: int) -> int:
    """Head and loss of one micro-batch, every position supervised."""
    positions, weight = (cfg.batch.micro_size or 1) * seq_length, BYTES[cfg.precision.name]
    if cfg.train.fused_loss:
        # A chunk of logits, its fp32 copy and its gradient; d hidden; d head in fp32 (recipes/models/loss.py).
        chunk = min(max(LOSS_CHUNK, LOSS_POSITIONS * shape.vocab), positions * shape.vocab)
        head_gradient = shape.vocab * shape.hidden * FP32
        return chunk * (weight + 2 * FP32) + positions * shape.hidden * weight + head_gradient
    # The logits, their log-probabilities in fp32, and the fp32 gradient of those.
    return positions * shape.vocab * (weight + 2 * FP32)
