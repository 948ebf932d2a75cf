"""The recipe's model in a layout: cut into stages, divided over tensor ranks, sharded by ZeRO-3, whole nowhere."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from conf.schema import Config
from launch.runtime.allocator import memory_goes_back
from launch.runtime.topology import Topology
from recipes.base import Recipe
from recipes.models.build import Place, checkpoint_layers, compile_layers, from_pretrained, from_scratch
from recipes.models.layouts import split
from recipes.models.stages import Stage, cut, ranges
from recipes.models.tensor_parallel import shard, take_shares

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.float32}
"""Parameter dtype of each `precision`."""


def build(
    recipe: Recipe, cfg: Config, ds_config: dict[str, Any], device: torch.device, topology: Topology
) -> list[Stage]:
    """This rank's part of the recipe's model, as its stages; without a pipeline the only one."""
    stage3, layout = cfg.zero.stage == 3, topology.layout
    settings: dict[str, Any] = {
        "dtype": DTYPES[cfg.precision.name], "attention": cfg.model.attention, "device": device,
    }  # fmt: skip
    stages: list[Stage] = []

    def divide(model: PreTrainedModel) -> None:
        stages.extend(_divide(model, cfg, topology))

    def place(parameters: list[nn.Parameter]) -> None:
        if topology.tensor is not None:
            take_shares(parameters, topology.tensor)
        if zero3 is not None:
            zero3(parameters)

    if layout.tensor * layout.pipeline > 1 or stage3:
        settings |= {"divide": divide, "place": place}
    with memory_goes_back() if "place" in settings else nullcontext():
        zero3 = _sharder(ds_config, topology.grid) if stage3 else None
        folder = recipe.weights()
        config = recipe.model_config()
        if folder is None:
            model = from_scratch(recipe.hf_class(), config, seed=cfg.seed, **settings)
        else:
            new_head = cfg.seed if recipe.new_head() else None
            settings |= {"config": config, "new_head_seed": new_head, "variant": cfg.model.variant}
            model = from_pretrained(recipe.hf_class(), folder, **settings)
    checkpoint_layers(model, cfg.train.activation_checkpointing)
    if cfg.train.compile:
        compile_layers(model)
    return stages or [Stage(model)]


def _divide(model: PreTrainedModel, cfg: Config, topology: Topology) -> list[Stage]:
    """Cut and mark; `recipes.models.layouts.problems` has let it pass."""
    layout, place = topology.layout, topology.place
    stages = [Stage(model)]
    if layout.pipeline > 1:
        layers = ranges(split(model, cfg.parallel))
        stages = cut(model, {number: layers[number] for number in layout.stages_of(place.pipeline)}, layout.stages)
    if topology.tensor is not None:
        shard(model, topology.tensor)
    return stages


def _sharder(ds_config: dict[str, Any], mpu: Any) -> Place:
    """Shards a block's parameters over the data ranks, as soon as their values are final (ZeRO-3)."""
    group = mpu.get_data_parallel_group() if mpu is not None else None
    # Not entered as a context: that would shard each submodule before the family has initialised it.
    init = deepspeed.zero.Init(config_dict_or_path=ds_config, mpu=mpu, data_parallel_group=group)

    def shard_block(parameters: list[nn.Parameter]) -> None:
        init._convert_to_zero_parameters(parameters)

    return shard_block
