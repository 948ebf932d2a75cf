"""The engine's configuration: a pure function of ours. Every value is explicit, none is "auto".

Names, types and behaviour are those of DeepSpeed 0.19.8: `runtime/config.py`, `runtime/zero/config.py`,
`runtime/precision_config.py`; how a name becomes an optimizer is `DeepSpeedEngine._configure_basic_optimizer`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.batch import Layout
from conf.rules_optimizer import MODEL_DTYPE
from conf.schema import Config, OptimizerConfig, ZeroConfig

QUIET = 1_000_000_000
"""Steps between the engine's own progress lines: none in practice."""

TORCH_OPTIMIZERS = {
    name.lower(): name for name in ("Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
}
"""Classes of torch.optim that the engine has no optimizer of its own for, by lower-case name."""


def ds_config(cfg: Config, layout: Layout, device: str) -> dict[str, Any]:
    """What `deepspeed.initialize(config=…)` gets: plain Python values only.

    device: `cpu` or `cuda`, what the run trains on. `cfg.deepspeed` is merged last, block by block.
    """
    precision, zero = cfg.precision, cfg.zero
    micro, accumulation = cfg.batch.micro_size, cfg.batch.accumulation
    assert micro and accumulation, "conf.compose fills in the batch"
    config: dict[str, Any] = {
        "train_batch_size": micro * accumulation * layout.replicas,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        # 0.19.8 clips at 1.0 when the key is missing; 0.0 is off.
        "gradient_clipping": float(cfg.optimizer.gradient_clipping),
        "optimizer": _optimizer(cfg.optimizer, zero),
        "zero_optimization": _zero(cfg, device),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": _offloads(zero),
        "data_types": {
            # Stage 0 takes the parameters' own dtype only, the others fp32 too (rule in conf/rules_optimizer.py).
            "grad_accum_dtype": precision.accumulation_dtype,
            "param_dtype": MODEL_DTYPE[precision.name],
        },
        # Left out, the engine reduces in the parameters' dtype: fp32 accumulation would then add up rounded sums.
        "communication_data_type": precision.accumulation_dtype,
        "seq_parallel_communication_data_type": precision.accumulation_dtype,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        **_precision(cfg),
        # A tag that differs between ranks is a checkpoint that cannot be read: stop instead of warning.
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
        "steps_per_print": QUIET,
        # 0.19.8 measures samples per second, which nobody reads here, and waits for the GPU before each micro-batch and
        # behind it to do so: no work would be launched ahead of the device.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "disable_python_gc": False,
    }
    if layout.pipeline > 1:
        # Tensor ranks send a share of the hidden states each and gather them at the other end; DualPipeV cannot.
        partitioned = layout.tensor > 1 and layout.stages == layout.pipeline
        config["pipeline"] = {
            "stages": layout.pipeline,
            "partition": "uniform",
            "seed_layers": False,
            # Layers are checkpointed inside a stage (recipes/models/build.py), not stages as a whole.
            "activation_checkpoint_interval": 0,
            "use_reentrant": False,
            "pipe_partitioned": partitioned,
            "grad_partitioned": partitioned,
        }
    if "nvme" in (zero.offload_optimizer, zero.offload_param):
        config["aio"] = {
            "block_size": 2**20,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }
    return merged(config, cfg.deepspeed)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; neither is changed, and the result shares nothing with them."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _offloads(zero: ZeroConfig) -> bool:
    return zero.offload_optimizer != "none"


def _optimizer(optimizer: OptimizerConfig, zero: ZeroConfig) -> dict[str, Any]:
    """{type, params}: fields that this optimizer does not take are null in our config and stay out."""
    name = optimizer.name.lower()
    params: dict[str, Any] = {"lr": float(optimizer.lr), "weight_decay": float(optimizer.weight_decay)}
    if optimizer.betas is not None:
        params["betas"] = [float(beta) for beta in optimizer.betas]
    if optimizer.eps is not None:
        params["eps"] = float(optimizer.eps)
    if optimizer.momentum is not None:
        params["momentum"] = float(optimizer.momentum)
    if name in ("adam", "adamw", "muon"):
        # Without it the engine gives `adam` the decoupled decay of AdamW too.
        params["adam_w_mode"] = name != "adam"
        # torch's own Adam: the engine's FusedAdam is compiled at start and exists on CUDA only. The offloaded step
        # needs the engine's CPUAdam, which `torch_adam` would keep out in silence.
        params["torch_adam"] = not _offloads(zero)
    if optimizer.fused and not _offloads(zero):
        params["fused"] = True  # handed through to torch.optim; false would switch its multi-tensor steps off too
    return {"type": TORCH_OPTIMIZERS.get(name, name), "params": params}


def _precision(cfg: Config) -> dict[str, Any]:
    precision = cfg.precision
    return {
        "fp16": {
            "enabled": precision.name == "fp16",
            "auto_cast": False,
            "loss_scale": float(precision.loss_scale),
            "initial_scale_power": int(precision.initial_scale_power),
            "loss_scale_window": int(precision.loss_scale_window),
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
            "fp16_master_weights_and_grads": False,
        },
        "bf16": {
            "enabled": precision.name == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "torch_autocast": {
            "enabled": precision.name == "bf16_autocast",
            "dtype": "bfloat16",
            # Modules whose gradients the engine would *reduce* in bf16 (nn.Linear unless stated), whatever
            # communication_data_type says. Autocast itself does not read it.
            "lower_precision_safe_modules": [],
        },
    }


def _zero(cfg: Config, device: str) -> dict[str, Any]:
    """The zero_optimization block with the keys that its stage reads."""
    zero = cfg.zero
    block: dict[str, Any] = {"stage": zero.stage}
    if zero.stage == 0:
        return block
    block |= {
        "contiguous_gradients": True,
        # stage3.py of 0.19.8: "Muon and reduce scatter cannot be used together".
        "reduce_scatter": not (zero.stage == 3 and cfg.optimizer.name.lower() == "muon"),
        "reduce_bucket_size": zero.reduce_bucket_size,
        "overlap_comm": zero.overlap_comm,
        "load_from_fp32_weights": True,
    }
    if zero.stage < 3:
        block |= {
            "allgather_partitions": True,
            "allgather_bucket_size": zero.allgather_bucket_size,
            "use_multi_rank_bucket_allreduce": True,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "parameter_alignment": False,
            "compute_grad_norm": True,
        }
    else:
        block |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_model_persistence_threshold": 2**63 - 1,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": zero.hpz_partition_size,
            "zero_quantized_weights": zero.quantized_weights,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": zero.quantized_gradients,
        }
        block["offload_param"] = _offload_param(zero, device)
    block["offload_optimizer"] = _offload_optimizer(zero, device)
    return block


def _offload_optimizer(zero: ZeroConfig, device: str) -> dict[str, Any]:
    block: dict[str, Any] = {"device": zero.offload_optimizer}
    if zero.offload_optimizer != "none":
        # Pinned pages speed up copies between host and GPU; on a CPU there is nothing to copy to.
        block |= {"pin_memory": device == "cuda", "ratio": 1.0, "fast_init": False}
    if zero.offload_optimizer == "nvme":
        block |= {"nvme_path": _nvme(zero), "buffer_count": 4, "pipeline_read": False, "pipeline_write": False}
    return block


def _offload_param(zero: ZeroConfig, device: str) -> dict[str, Any]:
    block: dict[str, Any] = {"device": zero.offload_param}
    if zero.offload_param != "none":
        block["pin_memory"] = device == "cuda"
    if zero.offload_param == "nvme":
        block |= {
            "nvme_path": _nvme(zero),
            "buffer_count": 5,
            "buffer_size": 100_000_000,
            "max_in_cpu": 1_000_000_000,
        }
    return block


def _nvme(zero: ZeroConfig) -> str:
    """The folder with `~` resolved, as the rules checked it: the engine would make a folder of that name."""
    return str(Path(zero.nvme_path or "").expanduser())
