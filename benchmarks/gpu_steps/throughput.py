"""Steps c and d: tokens/s, MFU and peak memory of three loops, and of ours with one thing changed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import LOOPS, Job, held_out_batch
from benchmarks.gpu_steps import attention
from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.runs import Peak, Run, device_name, join, prepared, synchronise

WARM, BLOCKS, STEPS = 3, 2, 5
"""Untimed steps, and blocks of timed ones: in two rounds 20 steps of each loop."""
MODEL = ("model=llama_1b", "precision=bf16", "zero=stage1", "data.packing=blocks", "batch.global_size=8")
MICRO = {2048: 4, 4096: 2}
"""Sequences of a micro-batch: all logits of it, which the other loops hold, fit 80 GiB beside the model."""
PACKED = ("data.packing=documents",)
CHANGES: dict[str, tuple[str, ...]] = {
    "packed_sdpa": (*PACKED, "model.attention=sdpa"),
    "packed_flex": (*PACKED, "model.attention=flex_attention"),
    "packed_varlen": PACKED,
    "packed_flash_2": (*PACKED, "model.attention=flash_attention_2"),
    "packed_flash_3": (*PACKED, "model.attention=flash_attention_3"),
    "plain_loss": ("train.fused_loss=false",),
    "liger_loss": (),
    "engine_adam": (),
    "compile": ("train.compile=true",),
}
PACKAGES = {"packed_flash_2": "flash_attn", "packed_flash_3": "flash_attn_interface", "liger_loss": "liger_kernel"}


class Clock:
    """Called by a loop when it is built and after every step; times blocks of steps, the device being waited for."""

    def __init__(self, device: torch.device):
        self._device, self._calls, self._since = device, -1, time.perf_counter()
        self.build_s = self.first_step_s = 0.0
        self.blocks_s: list[float] = []
        self.peak: Peak | None = None
        self.build_bytes = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls > 1 and (self._calls < WARM or (self._calls - WARM) % STEPS):
            return
        synchronise(self._device)
        now = time.perf_counter()
        if self._calls == 0:
            self.build_s, self.build_bytes = now - self._since, Peak.bytes(Peak(self._device))
            self.peak = Peak(self._device)
        elif self._calls == 1:
            self.first_step_s = now - self._since
        elif self._calls > WARM:
            self.blocks_s.append(now - self._since)
        self._since = time.perf_counter()

    @property
    def step_s(self) -> float:
        """Of a step, the mean over all blocks."""
        return sum(self.blocks_s) / len(self.blocks_s) / STEPS


def turn(context: Context, loop: str, length: int, number: int) -> Callable[[], None]:
    """One turn of one loop. number: of the round."""
    overrides = [*MODEL, f"batch.micro_size={MICRO[length]}", f"data.seq_length={length}"]
    run = prepared(context, *overrides)
    return lambda: take_turn(context, run, loop, {"loop": loop, "length": run.cfg.data.seq_length, "round": number})


def changed(context: Context, change: str) -> Callable[[], None]:
    """One turn of our loop with one thing changed."""
    length = 2048
    what: dict[str, Any] = {"change": change, "length": length}
    overrides = list(CHANGES[change])
    package = PACKAGES.get(change)
    if package and importlib.util.find_spec(package) is None:
        return lambda: context.row(change, **what, note=f"{package} is not installed")
    if context.device == "cpu" and any(word.startswith("model.attention=fl") for word in overrides):
        what["note"] = "not on cpu"  # flash attention, and the backward pass of flex attention; rehearsed with SDPA
        overrides[-1] = "model.attention=sdpa"
    run = prepared(context, *MODEL, f"batch.micro_size={MICRO[length]}", f"data.seq_length={length}", *overrides)

    def work() -> None:
        if change == "packed_varlen":
            attention.register()
            run.cfg.model.attention = attention.NAME
            run.request = [*run.request, f"attention {attention.NAME}"]
        if change == "liger_loss":
            what.update(with_liger(context))
        if change == "engine_adam":
            what.update(with_engine_adam(context))
        take_turn(context, run, "ours", what)

    return work


def take_turn(context: Context, run: Run, loop: str, what: dict[str, Any]) -> None:
    """Build, warm, time; the figures are written before the held-out loss is asked for."""
    device = join(context)
    run.cfg.train.steps = steps = WARM + BLOCKS * STEPS
    job = Job(run.cfg, run.recipe, run.layout, device, 0, steps)
    held_out, clock = run.recipe.held_out, Clock(device)
    started = time.perf_counter()
    loss = LOOPS[loop](job, clock)
    planned = run.planned()
    figures = {
        **what, **planned, "tokens_per_s": planned["tokens_per_step"] / clock.step_s,
        "blocks_tokens_per_s": [planned["tokens_per_step"] * STEPS / seconds for seconds in clock.blocks_s],
        "mfu": run.mfu(clock.step_s, device_name(device)), "measured_step_s": clock.step_s,
        "timed_steps": BLOCKS * STEPS,
        "first_step_s": clock.first_step_s, "build_s": clock.build_s, "build_bytes": clock.build_bytes,
        "measured_bytes": clock.peak.bytes() if clock.peak else None, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if loop != "ours":  # the plan is of our loop
        del figures["predicted_bytes"], figures["predicted_step_s"]
    if device.type == "cuda":
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
    context.row(str(what.get("change", loop)), **figures)
    try:
        context.row("held-out loss", **what, held_out_loss=loss(held_out_batch(job, held_out)))
    except Exception as error:
        context.row("held-out loss", **what, note=f"{type(error).__name__}: {error}"[:500])


def with_liger(context: Context) -> dict[str, Any]:
    """Liger's fused head and cross-entropy in the place of ours; what is to be said of it."""
    from recipes.models import loss

    if context.device == "cpu":
        return {"note": "not on cpu"}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    try:  # gradients of the head added up in fp32, as ours are
        liger, said = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32), {}
    except TypeError:
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        said = {"note": "this Liger adds up the head's gradient in bf16"}

    def fused(hidden: Any, weight: Any, bias: Any, labels: Any, vocabulary: Any = None) -> Any:
        return liger(weight, hidden, labels, bias).float()

    loss.linear_cross_entropy = fused
    return said


def with_engine_adam(context: Context) -> dict[str, Any]:
    """The engine's FusedAdam in the place of torch's fused AdamW; what is to be said of it."""
    from launch.runtime import ds_config as module

    ours = module.ds_config

    def config(*arguments: Any) -> dict[str, Any]:
        found = ours(*arguments)
        found["optimizer"]["params"].pop("fused", None)
        found["optimizer"]["params"]["torch_adam"] = context.device == "cpu"
        return found

    module.ds_config = config
    return {"note": "not on cpu"} if context.device == "cpu" else {}
