"""The one exporter: a running engine's parameters, streamed one shard at a time into a normal Hugging Face folder."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from launch.runtime.engine import Engine
    from recipes.base import Recipe

SHARD_BYTES = 4 * 2**30
"""Largest safetensors file; also the most that rank 0 holds beyond its own share while exporting."""


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard is larger than `limit` bytes.

    A layer is never cut (transformers may merge several of its tensors into one when it converts names for the disk),
    so a layer or a tensor larger than the limit is a shard of its own.
    """

    def layer(name: str) -> str:
        match = re.match(r"(.*?\.\d+)\.", name)
        return match.group(1) if match else name

    shards: list[list[str]] = [[]]
    room = limit
    for _, group in itertools.groupby(sizes, layer):
        names = list(group)
        size = sum(sizes[name] for name in names)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].extend(names)
        room -= size
    return shards


def export(engine: Engine, recipe: Recipe, folder: Path, first: bool, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the engine's model to `folder` so that `from_pretrained` loads it. A collective call; rank 0 writes.

    Parameters are gathered one at a time and written shard by shard. The folder appears whole, by a rename, or not at
    all.
    Weights are in the dtype that training computed with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = engine.module
    scratch = folder.with_name(f".{folder.name}.tmp")
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    element = {name: p.element_size() for name, p in model.named_parameters()}
    buffers = {name: b for name, b in _persistent_buffers(model)}
    sizes = {name: shape.numel() * element[name] for name, shape in shapes.items()}
    plan = _shards(sizes, shard_bytes)
    index: dict[str, str] = {}
    stream = engine.parameters()
    for number, names in enumerate(plan, 1):
        held: dict[str, torch.Tensor] = {}
        for _ in names:
            name, value = next(stream)
            if first:
                held[name] = value.to("cpu", copy=True).contiguous()
        if first:
            if number == len(plan):
                held.update({name: b.to("cpu", copy=True).contiguous() for name, b in buffers.items()})
            held = revert_weight_conversion(model, held)
            held = {name: value.contiguous() for name, value in held.items()}
            file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            save_file(held, scratch / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(held, file))
    for _ in stream:  # exhausts the generator on every rank: its last gather must be released together
        raise RuntimeError("parameters changed while exporting")
    if first:
        if len(plan) > 1:
            total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
            (scratch / "model.safetensors.index.json").write_text(json.dumps(total, indent=2))
        config = model.config
        config.use_cache, config.architectures = True, [type(model).__name__]
        config.save_pretrained(scratch)
        config.use_cache = False
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(scratch)
        recipe.save_processor(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)


def _persistent_buffers(model) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
