"""The engine's own kernels: compiled when they are first needed, by one process at a time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conf.schema import Config
from recipes import durable

OFFLOADED = {
    "adamw": "CPUAdamBuilder", "adam": "CPUAdamBuilder", "muon": "CPUAdamBuilder", "lion": "CPULionBuilder",
    "adagrad": "CPUAdagradBuilder",
}  # fmt: skip
"""Optimizer → what builds the kernel of its offloaded step."""
ON_GPUS = {"lion": "FusedLionBuilder", "lamb": "FusedLambBuilder"}
"""Optimizer → what builds the kernel of its step on a GPU; the others are torch's."""

MARK = "DEEPSPEED_RECIPES_BUILD"
WATCH = """
import os, signal, sys
if os.read(0, 4) != b"done":
    found = True
    while found:
        found = False
        for pid in (name for name in os.listdir("/proc") if name.isdigit()):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    marked = sys.argv[1].encode() in file.read().split(b"\\0")
                with open(f"/proc/{pid}/stat", "rb") as file:
                    lives = file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
                if marked and lives:
                    found = True
                    os.kill(int(pid), signal.SIGKILL)
            except OSError:
                pass
"""
"""Program: when its standard input ends without a word, kill all processes with a variable in their environment."""


def build(name: str) -> None:
    """Compile a kernel, or find it compiled. name: of the engine's class that builds it.

    torch's own lock is a file that an interrupted build leaves behind, and then every later run waits for it without a
    word. Ours ends with its process; whoever holds it may take torch's away.
    """
    from deepspeed.accelerator import get_accelerator
    from filelock import FileLock
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder(name)
    if builder is None or not builder.is_compatible(verbose=False):
        return  # the engine says why, where it needs it
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    durable.make_folder(root)
    with FileLock(root / "deepspeed_recipes.lock"):
        for stale in root.glob(f"**/{builder.name}/lock"):
            durable.remove(stale)
        with no_compiler_left():
            builder.load(verbose=False)


@contextlib.contextmanager
def no_compiler_left() -> Iterator[None]:
    """End the compilers that the block has started when it does not come to its end, nor this process.

    torch runs ninja, whose compilers would work on for minutes when ninja or this process is killed. They are known by
    a variable in their environment; another process waits for this one's end.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCH, f"{MARK}={mark}"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert watch.stdin is not None
    os.environ[MARK] = mark
    try:
        yield
        with contextlib.suppress(OSError):
            watch.stdin.write(b"done")
            watch.stdin.flush()
    finally:
        del os.environ[MARK]
        with contextlib.suppress(OSError):
            watch.stdin.close()
        watch.wait()


def build_for(cfg: Config, device: str) -> None:
    """The kernels that a run needs: of a step that is offloaded, or that torch does not have, and of ZeRO++."""
    offloads = cfg.zero.offload_optimizer != "none"
    wanted = [(OFFLOADED if offloads else ON_GPUS if device == "cuda" else {}).get(cfg.optimizer.name.lower())]
    if device == "cuda" and (cfg.zero.quantized_weights or cfg.zero.quantized_gradients):
        wanted.append("QuantizerBuilder")
    for name in filter(None, wanted):
        build(name)
