"""Step f: what offloading the optimizer costs, kernels included, and a save and a load in the middle of training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.runs import (
    Peak,
    batches_of,
    engine_of,
    join,
    measured,
    prepared,
    timed,
)
from benchmarks.gpu_steps.throughput import MICRO, MODEL

LENGTH = 2048


def kernels(context: Context) -> Callable[[], None]:
    """Compile what later sub-steps need, beside the others and behind them in the queue for cores."""
    from launch.runtime import kernels, processes

    processes.set_environment(processes.ranks_from_environment(), context.device)

    def work() -> None:
        os.nice(10)
        for name in ("CPUAdamBuilder", *(["FusedAdamBuilder"] if context.device == "cuda" else [])):
            started = time.perf_counter()
            kernels.build(name)
            context.row(name, seconds=time.perf_counter() - started, cores=os.cpu_count())
        if context.device != "cuda":
            context.row("FusedAdamBuilder", note="not on cpu")

    return work


def offload(context: Context) -> Callable[[], None]:
    """Steps of the model of step c with its optimizer in host memory: beside c's own, what that costs."""
    shape = [*MODEL, f"batch.micro_size={MICRO[LENGTH]}", f"data.seq_length={LENGTH}"]
    runs = {
        zero: prepared(context, *(f"zero={zero}" if word.startswith("zero=") else word for word in shape))
        for zero in ("stage2", "stage2_offload")
    }

    def work() -> None:
        device = join(context)
        for zero, run in runs.items():
            resident = _resident_bytes()
            figures = measured(run, device)
            context.row(zero, **figures, host_bytes_more=_resident_bytes() - resident)

    return work


def save(context: Context) -> Callable[[], None]:
    """A checkpoint written beside steps, one with nothing beside it, and a load."""
    run = prepared(context, *MODEL, f"batch.micro_size={MICRO[LENGTH]}", f"data.seq_length={LENGTH}")

    def work() -> None:
        from launch.runtime.checkpoint import newest
        from launch.runtime.loop import Progress
        from launch.runtime.saving import Saving
        from launch.runtime.session import restored

        device = join(context)
        engine = engine_of(run, device)
        saving = Saving(context.folder / "checkpoints", 1, 0, asdict(run.cfg), "random rows", print)
        position = 0

        def steps(count: int) -> None:
            nonlocal position
            for _ in range(count):
                engine.train_step(batches_of(run, position))
                position += 1

        steps(3)
        peak = Peak(device)
        alone_s = timed(lambda: steps(3), device)
        context.row("three steps", seconds=alone_s, peak_bytes=peak.bytes())
        peak = Peak(device)
        held: dict[str, float] = {}

        def beside() -> None:
            held["s"] = timed(lambda: saving.begin(engine, position, asdict(Progress(step=position))), device)
            steps(3)

        beside_s = timed(beside, device)
        context.row("three steps with a save beside them", seconds=beside_s, begin_s=held["s"], peak_bytes=peak.bytes())
        rest_s = timed(lambda: _whole(saving), device)
        found = newest(saving.folder)
        assert found is not None
        size = sum(facts["bytes"] for facts in found.manifest["files"].values())
        context.row(
            "the save, to its end", seconds=beside_s - alone_s + rest_s, bytes=size, longer_s=beside_s - alone_s
        )
        peak = Peak(device)
        load_s = timed(lambda: restored(engine, found, run.layout), device)
        context.row("a load, in place", seconds=load_s, bytes=size, peak_bytes=peak.bytes())

    return work


def _whole(saving: Any) -> None:
    if not saving.finish():
        raise RuntimeError("the checkpoint could not be written")


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
