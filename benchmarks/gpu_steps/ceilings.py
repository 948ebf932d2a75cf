"""Step a: what the device does at most."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.runs import synchronise

TIMES = 20


def ceilings(context: Context) -> Callable[[], None]:
    """nvidia-smi, properties, matrix products (TFLOP/s), copies (GB/s; a copy reads and writes)."""

    def work() -> None:
        device = torch.device(context.device, 0) if context.device == "cuda" else torch.device("cpu")
        properties(context, device)
        size = 256 if context.tiny else 8192
        # A try of its own each: one that fails leaves the figures of the others.
        problems = []
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, False), ("fp16", torch.float16, False), ("fp32", torch.float32, False),
            ("tf32", torch.float32, True),
        ):  # fmt: skip
            try:
                context.row(f"product {name}", **product(device, size, dtype, tf32))
            except Exception as error:
                problems.append(f"product {name}: {type(error).__name__}: {error}")
        for name, call in (("device copy", device_copy), ("host to device, pinned", from_host)):
            try:
                context.row(name, **call(device, 2**22 if context.tiny else 2**31))
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
        if problems:
            raise RuntimeError("; ".join(problems))

    return work


def properties(context: Context, device: torch.device) -> None:
    """What the device says of itself."""
    if device.type != "cuda":
        context.row("properties", note="not on cpu", threads=torch.get_num_threads())
        context.row("nvidia-smi", note="not on cpu")
        return
    found = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    context.row(
        "properties", device=found.name, total_bytes=total_bytes, free_bytes=free_bytes,
        multiprocessors=found.multi_processor_count, capability=f"{found.major}.{found.minor}",
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )  # fmt: skip
    try:
        said = subprocess.run(
            ["nvidia-smi"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            stdin=subprocess.DEVNULL,
        )
        context.row("nvidia-smi", text=said.stdout[-6000:])
    except (OSError, subprocess.SubprocessError) as error:
        context.row("nvidia-smi", note=f"{type(error).__name__}: {error}")


def product(device: torch.device, size: int, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """A product of two matrices of size × size: 2·size³ operations."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = 5 if dtype == torch.float32 and not tf32 else TIMES
    seconds = median_s(lambda: left @ right, device, times)
    return {"size": size, "seconds": seconds, "tflop_per_s": 2 * size**3 / seconds / 1e12}


def device_copy(device: torch.device, size: int) -> dict[str, Any]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), device, TIMES)
    return {"bytes": size, "seconds": seconds, "gb_per_s": 2 * size / seconds / 1e9}


def from_host(device: torch.device, size: int) -> dict[str, Any]:
    source = torch.ones(size, dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = median_s(lambda: target.copy_(source, non_blocking=True), device, TIMES)
    return {"bytes": size, "seconds": seconds, "gb_per_s": size / seconds / 1e9}


def median_s(action: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds of one call, the median of `times`."""
    for _ in range(3):
        action()
    seconds = []
    for _ in range(times):
        synchronise(device)
        started = time.perf_counter()
        action()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds)
