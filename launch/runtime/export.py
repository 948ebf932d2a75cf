"""The one exporter: parameters streamed one shard at a time into a normal Hugging Face folder."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from conf.errors import Problem, RequestError
from conf.weight_files import find_weights
from launch.runtime.tensor_file import reading, write_tensors
from recipes import durable, hub
from recipes.checksums import SUMS, write_sums

if TYPE_CHECKING:
    from launch.runtime.engine import Engine
    from launch.runtime.state import SavedState
    from recipes.base import Recipe

SHARD_BYTES = 4 * 2**30
"""Largest safetensors file; also the most that rank 0 holds beyond its own share while exporting."""

Tensors = dict[str, torch.Tensor]


def export(
    engine: Engine, recipe: Recipe, folder: Path, first: bool, shard_bytes: int = SHARD_BYTES,
    check: Callable[[], object] = lambda: None, ready: Callable[[], object] = lambda: None,
) -> OSError | None:  # fmt: skip
    """Write the engine's model to `folder` so that `from_pretrained` loads it. A collective call; rank 0 writes.

    Returns, on rank 0, why it could not be written; what was there before is there still then. And when `check` raises,
    which all ranks call together before each shard. ready: rank 0 calls it before the folder takes its place; may raise
    OSError, too.

    Parameters are gathered one at a time. The folder appears whole, by a rename, or not at all. Weights are in the
    dtype that training computed with, under the names that the family's checkpoints on the hub have.
    """
    stream, sizes = engine.stream(), engine.tensors()
    try:
        _write_model(engine.module, recipe, stream, sizes, folder, first, shard_bytes, check, ready)
    except BaseException as error:
        stream.close()  # on every rank: the last parameter it gathered is released
        if first:
            durable.remove(durable.beside(folder))
        if not isinstance(error, OSError):
            raise
        return error
    return None


def export_saved(saved: SavedState, recipe: Recipe, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """The same from a checkpoint, in this process alone, tensor by tensor; `recipe` is prepared.

    Raises RequestError when the checkpoint is of another model than the recipe's.
    """
    from launch.runtime.engine import persistent_buffers
    from launch.runtime.fragments import MASTER
    from launch.runtime.state import BUFFER, FROZEN
    from recipes.models.build import on_meta

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.cfg.precision.name, torch.float32)
    model = on_meta(recipe.hf_class(), recipe.model_config(), dtype=dtype, attention=recipe.cfg.model.attention)
    if (weights := recipe.weights()) is not None and (weights / "generation_config.json").exists():
        model.generation_config = hub.generation_config(weights)
    values = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    if values.keys() != set(saved.names):
        other = sorted(values.keys() ^ set(saved.names))
        raise RequestError(Problem("RUN_DIR", other[0], "a tensor of the checkpoint, or of the model, but not of both"))

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in values.items():
            kind = next(kind for kind in (MASTER, FROZEN, BUFFER) if saved.has(name, kind))
            yield name, saved.whole(name, kind).to(value.dtype)

    sizes = {name: value.numel() * value.element_size() for name, value in values.items()}
    _write_model(model, recipe, stream(), sizes, folder, True, shard_bytes)


def _write_model(
    model: PreTrainedModel, recipe: Recipe, stream: Iterator[tuple[str, torch.Tensor]], sizes: dict[str, int],
    folder: Path, first: bool, shard_bytes: int, check: Callable[[], object] = lambda: None,
    ready: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    from transformers.core_model_loading import revert_weight_conversion

    def describe(scratch: Path) -> None:
        config = model.config
        config.use_cache, config.architectures = True, [type(model).__name__]
        config.save_pretrained(scratch)
        config.use_cache = False
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(scratch)
        recipe.save_processor(scratch)
        ready()

    def renamed(held: Tensors) -> Tensors:
        return revert_weight_conversion(model, held)

    _write(stream, sizes, folder, describe, renamed, first, shard_bytes, check)


def convert(source: Path, folder: Path, dtype: torch.dtype | None, shard_bytes: int = SHARD_BYTES) -> None:
    """Copy an exported model to `folder` in another dtype (None: as it is) or with other shards, tensor by tensor.

    Raises RequestError when `source` holds no model, or values that `dtype` cannot hold.
    """
    if not (source / "config.json").exists():
        rule = "holds no exported model (config.json and *.safetensors)"
        raise RequestError(Problem("MODEL", str(source), rule, "RUN_DIR/model of a finished run"))
    files = find_weights(source).files
    sizes: dict[str, int] = {}
    where: dict[str, Path] = {}
    for file in files:
        with reading(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                view = tensors.get_slice(name)
                element = torch.empty(0, dtype=dtype).element_size() if dtype else 4
                sizes[name] = element * torch.Size(view.get_shape()).numel()
                where[name] = file

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, file in where.items():
            with reading(file) as tensors:
                value = tensors.get_tensor(name)
            yield name, cast(name, value) if dtype is not None and value.is_floating_point() else value

    def cast(name: str, value: torch.Tensor) -> torch.Tensor:
        largest = value.abs().max().item() if value.numel() else 0.0
        if dtype is not None and largest > torch.finfo(dtype).max:
            rule = f"{name} has values up to {largest:.3g}, more than it can hold"
            raise RequestError(Problem("dtype", str(dtype).removeprefix("torch."), rule, "dtype=bf16"))
        return value.to(dtype)

    def describe(scratch: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and ".safetensors" not in file.name and file.name != SUMS:
                shutil.copy(file, scratch / file.name)
        if dtype is not None:
            config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
            config["dtype"] = str(dtype).removeprefix("torch.")
            durable.replace_text(scratch / "config.json", json.dumps(config, indent=2) + "\n")

    try:
        _write(stream(), sizes, folder, describe, lambda held: held, True, shard_bytes)
    except BaseException:
        durable.remove(durable.beside(folder))
        raise


def _write(
    stream: Iterator[tuple[str, torch.Tensor]],
    sizes: dict[str, int],
    folder: Path,
    describe: Callable[[Path], None],
    renamed: Callable[[Tensors], Tensors],
    first: bool,
    shard_bytes: int,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write (name, tensor) pairs in the order and of the bytes of `sizes`; ranks other than the first only listen.

    Raises the first OSError once everything has come: the other ranks send, and check, to the end.
    """
    plan = _shards(sizes, shard_bytes)
    scratch = durable.beside(folder)
    index: dict[str, str] = {}
    total = 0
    problem: OSError | None = None

    def attempt(action: Callable[[], object]) -> None:
        nonlocal problem
        try:
            if first and problem is None:
                with durable.of_the_system(folder):
                    action()
        except OSError as error:
            problem = error

    def begin() -> None:
        durable.remove(scratch)
        durable.make_folder(scratch)

    def write(file: str, held: Tensors) -> None:
        nonlocal total
        held = {name: value.contiguous() for name, value in renamed(held).items()}
        described = {name: (value.dtype, value.shape) for name, value in held.items()}
        write_tensors(scratch / file, described, held.values(), metadata={"format": "pt"})
        index.update(dict.fromkeys(held, file))
        total += sum(value.nbytes for value in held.values())

    def finish() -> None:
        if len(plan) > 1:
            listing = {"metadata": {"total_size": total}, "weight_map": index}
            durable.replace_text(scratch / "model.safetensors.index.json", json.dumps(listing, indent=2) + "\n")
        describe(scratch)
        write_sums(scratch)
        durable.publish(scratch, folder)

    attempt(begin)
    for number, names in enumerate(plan, 1):
        check()
        held: Tensors = {}
        for expected in names:
            name, value = next(stream)
            assert name == expected, f"{name} came in place of {expected}"
            if first and problem is None:
                held[name] = value.to("cpu", copy=True).contiguous()
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        attempt(functools.partial(write, file, held))
    # Run the generator to its end on every rank: the last parameter it gathered is released there, together.
    assert next(stream, None) is None, "more tensors than were announced"
    attempt(finish)
    if problem is not None:
        raise problem


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
