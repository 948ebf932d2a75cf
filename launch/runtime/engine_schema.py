"""The engine's own configuration schema, read from the installed deepspeed.

`python -m launch.runtime.engine_schema` writes it to conf/engine_schema.json, where the rules check `deepspeed.*`
against it without importing torch. (To a file, because deepspeed logs to stdout while it is imported.)
Blocks that are pydantic models are read from the models; keys that the engine reads by hand (`runtime/config.py` and
the files named below) are written down here. A test compares the file with the installed engine.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import (
    _REMOVED_TOP_LEVEL_CONFIG_KEYS,
    _REMOVED_ZERO_CONFIG_KEYS,
    GRADIENT_ALLREDUCE_OP_SUPPORTED,
    HybridEngineConfig,
)
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recipes.durable import replace_text

Node = dict[str, Any]
"""types: JSON types of the value · keys: sub-keys of an object (absent: any) · choices, min, max, above, below ·
deprecated: the key that replaces it."""

FILE = Path(__file__).resolve().parents[2] / "conf" / "engine_schema.json"

JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", tuple: "array"}
JSON_TYPES |= {dict: "object", type(None): "null", Path: "string", torch.dtype: "string"}
DTYPES = ["fp16", "bf16", "fp32"]


def leaf(*kinds: type, **limits: Any) -> Node:
    """A value of one of these Python types."""
    return {"types": sorted(JSON_TYPES[kind] for kind in kinds), **limits}


def block(keys: dict[str, Node]) -> Node:
    """An object with exactly these keys."""
    return {"types": ["object"], "keys": keys}


BOOL, INT, NUMBER, TEXT, ANY_OBJECT = leaf(bool), leaf(int), leaf(float), leaf(str), leaf(dict)


def model_block(model: type[BaseModel]) -> Node:
    """The block that a pydantic model of the engine describes.

    An aliased field has a second spelling. It counts as deprecated: beside the alias, which our own configuration
    writes, it would be ignored.
    """
    keys: dict[str, Node] = {}
    for name, field in model.model_fields.items():
        node = _field(field)
        keys[field.alias or name] = node
        if field.alias and field.alias != name:
            keys[name] = {**node, "deprecated": field.alias}
    return block(keys)


def _field(field: FieldInfo) -> Node:
    node = _annotation(field.annotation)
    for constraint in field.metadata:
        for ours, theirs in (("min", "ge"), ("max", "le"), ("above", "gt"), ("below", "lt")):
            if getattr(constraint, theirs, None) is not None:
                node = {**node, ours: getattr(constraint, theirs)}
    extra = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("deprecated"):
        node = {**node, "deprecated": extra.get("new_param", "")}
    return node


def _annotation(hint: Any) -> Node:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _merged([_annotation(part) for part in arguments])
    if origin is typing.Literal:
        return {**leaf(*{type(choice) for choice in arguments}), "choices": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return model_block(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = list(dict.fromkeys(member.value for member in hint))
        return {**leaf(*{type(value) for value in values}), "choices": values}
    kind = origin or hint
    return leaf(kind) if kind in JSON_TYPES else {"types": sorted(set(JSON_TYPES.values()))}


def _merged(parts: list[Node]) -> Node:
    node: Node = {}
    for part in parts:
        node.update({key: value for key, value in part.items() if key != "types"})
    return {"types": sorted({kind for part in parts for kind in part["types"]}), **node}


BY_HAND: dict[str, Node] = {
    # runtime/config.py: get_scalar_param of each
    "train_batch_size": leaf(int, min=1),
    "train_micro_batch_size_per_gpu": leaf(int, min=1),
    "gradient_accumulation_steps": leaf(int, min=1),
    "managed_gradient_accumulation": BOOL,
    "steps_per_print": leaf(int, type(None), min=1),
    "dump_state": BOOL,
    "disable_python_gc": BOOL,
    "disable_allgather": BOOL,
    "communication_data_type": leaf(str, type(None), choices=[*DTYPES, None]),
    "seq_parallel_communication_data_type": leaf(str, type(None), choices=[*DTYPES, None]),
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": leaf(float, above=0),
    "gradient_allreduce_op": leaf(str, choices=list(GRADIENT_ALLREDUCE_OP_SUPPORTED)),
    "gradient_clipping": leaf(float, min=0),
    "zero_allow_untested_optimizer": BOOL,
    "zero_force_ds_cpu_optimizer": BOOL,
    "wall_clock_breakdown": BOOL,
    "memory_breakdown": BOOL,
    "dataloader_drop_last": BOOL,
    "log_level": leaf(str, type(None)),
    "use_data_before_expert_parallelism": BOOL,
    "vocabulary_size": leaf(int, type(None), min=1),
    "sequence_parallel_size": leaf(int, min=1),
    "data_parallel_size": leaf(int, min=1),
    "datastates_ckpt": ANY_OBJECT,
    "optimizer": block({"type": TEXT, "params": ANY_OBJECT, "legacy_fusion": BOOL}),
    "scheduler": block({"type": TEXT, "params": ANY_OBJECT}),
    "torch_autocast": block({"enabled": BOOL, "dtype": TEXT, "lower_precision_safe_modules": leaf(list)}),
    "data_types": block(
        {
            "grad_accum_dtype": leaf(str, type(None), choices=[*DTYPES, None]),
            "param_dtype": leaf(str, type(None), choices=[*DTYPES, None]),
            "buffer_dtype": leaf(str, type(None), choices=[*DTYPES, None]),
            "keep_in_fp32_modules": leaf(list),
        }
    ),
    # runtime/config.py: get_pipeline_config; runtime/pipe/engine.py reads use_reentrant
    "pipeline": block(
        {
            "stages": leaf(int, str),
            "partition": TEXT,
            "seed_layers": BOOL,
            "activation_checkpoint_interval": leaf(int, min=0),
            "pipe_partitioned": BOOL,
            "grad_partitioned": BOOL,
            "use_reentrant": BOOL,
        }
    ),
    # runtime/config.py: get_checkpoint_*; runtime/model_checkpointing/config.py
    "checkpoint": block(
        {
            "tag_validation": leaf(str, choices=["Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"]),
            "load_universal": BOOL,
            "use_node_local_storage": BOOL,
            "parallel_write": block({"pipeline_stage": BOOL}),
            "checkpoint_serialization": BOOL,
            "writer": block(
                {
                    "type": TEXT,
                    "io_buffer_size": leaf(int, min=1),
                    "io_buffer_double": BOOL,
                    "show_statistics": BOOL,
                    "data_parallel": leaf(str, type(None)),
                    "decoupled": BOOL,
                    "io_multiplier": leaf(int, min=1),
                }
            ),
        }
    ),
    # runtime/activation_checkpointing/config.py
    "activation_checkpointing": block(
        {
            "partition_activations": BOOL,
            "number_checkpoints": leaf(int, type(None)),
            "contiguous_memory_optimization": BOOL,
            "synchronize_checkpoint_boundary": BOOL,
            "profile": BOOL,
            "cpu_checkpointing": BOOL,
        }
    ),
    # runtime/swap_tensor/aio_config.py
    "aio": block(
        {
            "block_size": leaf(int, min=1),
            "queue_depth": leaf(int, min=1),
            "intra_op_parallelism": leaf(int, min=1),
            "single_submit": BOOL,
            "overlap_events": BOOL,
            "use_gds": BOOL,
        }
    ),
    # profiling/config.py
    "flops_profiler": block(
        {
            "enabled": BOOL,
            "recompute_fwd_factor": leaf(float, min=0),
            "profile_step": leaf(int, min=1),
            "module_depth": INT,
            "top_modules": leaf(int, min=1),
            "detailed": BOOL,
            "output_file": leaf(str, type(None)),
        }
    ),
    # runtime/data_pipeline/config.py, autotuning/config.py, module_inject/auto_ep_config.py: refused whole by our rules
    "data_efficiency": ANY_OBJECT,
    "autotuning": ANY_OBJECT,
    "expert_parallel": ANY_OBJECT,
}

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "hybrid_engine": HybridEngineConfig,
    "compile": CompileConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "weight_quantization": WeightQuantConfig,
}


def engine_schema() -> Node:
    """{deepspeed: version, keys: …, removed: {dotted key: the engine's own reason}}."""
    keys = {**BY_HAND, **{name: model_block(model) for name, model in MODELS.items()}}
    keys["timers"] = block({"throughput": model_block(DeepSpeedThroughputTimerConfig)})
    removed = {**_REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}": reason for key, reason in _REMOVED_ZERO_CONFIG_KEYS.items()}
    return {"deepspeed": deepspeed.__version__, "keys": keys, "removed": removed}


def as_text(schema: Node) -> str:
    """The text of the file."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    replace_text(FILE, as_text(engine_schema()))
