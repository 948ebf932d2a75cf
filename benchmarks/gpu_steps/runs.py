"""Requests of the steps: composed as the command composes them, over random rows that need no file."""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_steps.context import Context
from conf.batch import Layout
from conf.compose import compose
from conf.environment import detect
from conf.schema import Config
from launch.planner.flops import flops_per_row, peak_flops
from launch.planner.plan import make_plan
from launch.planner.search import ASSUMED
from launch.runtime import processes
from launch.runtime.ds_config import ds_config
from recipes.causal_lm import CausalLM
from recipes.models.shape import model_shape

BASE = ("+recipe=pretrain_llama", "scheduler=constant", "scheduler.warmup_steps=0", "train.steps=1000", "eval.every=0")
TINY = ("model=llama_tiny", "data.seq_length=64")
"""What a rehearsal has in the place of each model."""
WARM, TIMED = 2, 3
"""Steps of a measured request."""


class RandomRows:
    """(T,) random tokens; with documents=True in documents of 1 to T/2 tokens, whose positions restart.

    Every token but a document's last one has a label.
    """

    def __init__(self, size: int, length: int, vocabulary: int, documents: bool):
        self._size, self._length, self._vocabulary, self._documents = size, length, vocabulary, documents

    def __len__(self) -> int:
        return self._size

    def row(self, index: int) -> dict[str, np.ndarray]:
        draw, length = np.random.default_rng([7, index % self._size]), self._length
        stream = draw.integers(3, self._vocabulary, length + 1)
        labels, positions = stream[1:].copy(), np.arange(length)
        if self._documents:
            begin = 0
            while begin < length:
                end = min(length, begin + int(draw.integers(1, length // 2 + 1)))
                positions[begin:end] = np.arange(end - begin)
                labels[end - 1] = -100
                begin = end
        return {"input_ids": stream[:-1], "labels": labels, "position_ids": positions,
                "attended": np.ones(length, bool)}  # fmt: skip


class _Tokenizer:
    """As far as a recipe over random rows asks for one."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size


class RandomTokens(CausalLM):
    """The recipe of causal language models with random rows in the place of a source's."""

    def prepare(self, progress: Any = None) -> None:
        data, vocabulary = self.cfg.data, int(self.cfg.model.config["vocab_size"])
        self._folder, self.tokenizer = None, _Tokenizer(vocabulary)
        self.train, self.held_out = (
            RandomRows(size, data.seq_length, vocabulary, data.packing == "documents") for size in (512, 16)
        )
        self.report = {"fingerprint": "random rows"}

    def metrics(self, loss: float, supervised: int, predictions: Any = ()) -> dict[str, float]:
        return {"loss": loss}


@dataclass
class Run:
    """A composed request on one device, with what the planner says of it.

    request: the overrides, for whoever plans it again.
    """

    request: list[str]
    cfg: Config
    layout: Layout
    recipe: RandomTokens
    predicted_bytes: int
    flops_per_step: float
    predicted_step_s: float

    def planned(self) -> dict[str, Any]:
        return {
            "request": self.request, "predicted_bytes": self.predicted_bytes,
            "predicted_step_s": self.predicted_step_s, "flops_per_step": self.flops_per_step,
            "tokens_per_step": (self.cfg.batch.global_size or 0) * self.cfg.data.seq_length,
        }  # fmt: skip

    def mfu(self, step_s: float, device_name: str | None) -> float | None:
        """Model FLOPs of a step over what the device could have done meanwhile; None where its peak is not known."""
        peak = peak_flops(device_name, self.cfg.precision.name) if device_name else None
        return None if peak is None else self.flops_per_step / step_s / peak


def prepared(context: Context, *overrides: str) -> Run:
    """Compose, plan and fill with rows; needs no device. Of a key that is given twice the last value counts.

    The device is the context's. On a CPU fp16 is let through: it is slow there, and right.
    """
    processes.set_environment(processes.ranks_from_environment(), context.device)
    # Loaded before this one's turn, and only now: the engine settles on an accelerator when it is.
    import transformers

    import launch.runtime.loop
    import launch.runtime.staged

    _ = launch.runtime.loop, launch.runtime.staged, transformers.Trainer
    if context.tiny:
        kept = [word for word in overrides if not word.startswith("model.config.")]
        overrides = (*kept, *TINY)
    given = [*BASE, *overrides, f"device={context.device}"]
    request = list({word.partition("=")[0]: word for word in given}.values())
    cfg = compose(request, 1, replace(detect(), fp16_supported=True, cpu_fp16_supported=True))
    layout = Layout.of(1, cfg.parallel)
    recipe = RandomTokens(cfg)
    recipe.prepare()
    shape = model_shape(
        cfg.model, cfg.data, cfg.precision.name, cfg.parallel, recipe.hf_class(), recipe.row_shape, lambda network: []
    )
    plan = make_plan(cfg, layout, shape, {}, context.device)
    flops = flops_per_row(shape) * (cfg.batch.global_size or 0)
    rate = ASSUMED[context.device][0]
    return Run(request, cfg, layout, recipe, plan["bytes_per_rank"]["device"]["total"], flops, flops / rate)


def join(context: Context) -> torch.device:
    """The device, in a process group of this process alone."""
    device = processes.join(processes.ranks_from_environment(), context.device)
    if context.device == "cpu":
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).is_fp16_supported = lambda self: True
    return device


def engine_of(run: Run, device: torch.device, steps: int = 1000) -> Any:
    """The engine as launch/train.py builds it."""
    from launch.runtime.staged import make_engine

    config = ds_config(run.cfg, run.layout, device.type)
    return make_engine(run.recipe, run.cfg, run.layout, config, device, steps)


def batches_of(run: Run, step: int) -> list[dict[str, np.ndarray]]:
    from launch.runtime.loop import training_batches

    return training_batches(step, 0, run.recipe, run.cfg, run.layout)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


class Peak:
    """Most bytes since it was made: of the device's allocator, or of this process's resident set on a CPU."""

    def __init__(self, device: torch.device):
        self._device, self._resets = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            except OSError:
                self._resets = False

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        if self._resets:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
            if found:
                return int(found.group(1)) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, and of what it has launched."""
    synchronise(device)
    started = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - started


def measured(run: Run, device: torch.device) -> dict[str, Any]:
    """Predicted and measured memory and step time of a request; its engine is gone again afterwards.

    held_before_bytes were in use before it was built, and are not in measured_bytes.
    """
    free(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    peak = Peak(device)
    started = time.perf_counter()
    engine = engine_of(run, device)
    synchronise(device)
    build_s, build_bytes = time.perf_counter() - started, peak.bytes()
    peak, seconds = Peak(device), []
    for step in range(WARM + TIMED):
        batches = batches_of(run, step)
        started = time.perf_counter()
        engine.train_step(batches)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    figures = {
        **run.planned(), "measured_bytes": peak.bytes() - before, "build_bytes": build_bytes - before,
        "measured_step_s": float(np.median(seconds[WARM:])), "first_step_s": seconds[0], "build_s": build_s,
        "held_before_bytes": before,
    }  # fmt: skip
    engine.ds.destroy()
    del engine
    free(device)
    return figures


def free(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
