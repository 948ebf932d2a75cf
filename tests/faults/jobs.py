"""Jobs that die: a launcher and its ranks, forked from a server that has imported everything, in a process group.

A cold start costs seconds per rank, which 200 deaths would pay 400 times; what runs is `launch/train.py`'s own `main`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from disk import Disk, arm, server
from support.server import Line
from support.warm import FULL, look_again, rank_environment, wait_for, write_to

from launch.runtime.interruption import EXIT_CODE as INTERRUPTED
from launch.runtime.processes import free_port

ARGUMENTS = (
    "+recipe=quickstart", "model=llama_tiny", "data.max_files=30", "data.seq_length=64", "batch.global_size=8",
    "batch.micro_size=2", "train.steps=12", "scheduler.warmup_steps=1", "eval.every=5", "eval.new_tokens=2",
    "checkpoint.every=3", "checkpoint.keep=2", "run_dir=run", "resume=auto",
)  # fmt: skip
WORLD = 2
CALM_S = 30.0
"""What ranks have to end by themselves when their launcher died."""
INTERPRETER_S = 1.0
"""What an interpreter takes to end, which forked ranks do not: others may notice that a rank is gone before its
launcher knows the exit code."""
HANG, VANISH, NO_MEMORY, DELAY = -1, -2, -3, -4
"""In the place of a signal: the process does not go on; the run directory is deleted; the device has no memory left;
the process goes on `after_s` seconds later."""
Act = Callable[[], None]


def _poison(batch: int) -> None:
    """Let the loss of a global batch be no number."""
    import torch

    from launch.runtime import loop
    from recipes.causal_lm import CausalLM

    batches, loss, bad = loop.training_batches, CausalLM.loss, False

    def noted(number: int, *rest: Any) -> Any:
        nonlocal bad
        bad = number == batch
        return batches(number, *rest)

    def spoilt(self: Any, *inputs: Any) -> Any:
        return loss(self, *inputs) * (float("nan") if bad and torch.is_grad_enabled() else 1.0)

    loop.training_batches = noted
    CausalLM.loss = spoilt  # type: ignore[method-assign]


def _act(fault: Fault, folder: Path) -> None:
    """What a fault does to the process that comes into its phase."""
    if fault.signal == HANG:
        time.sleep(1000)
    elif fault.signal == VANISH:
        shutil.rmtree(folder / "run")
    elif fault.signal == DELAY:
        time.sleep(fault.after_s)
    elif fault.after_s:
        threading.Timer(fault.after_s, os.kill, (os.getpid(), fault.signal)).start()
    elif fault.signal == NO_MEMORY:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all.")
    elif fault.who == "launcher":
        os.kill(os.getppid(), fault.signal)
    else:
        os.kill(os.getpid(), fault.signal)


def _before(owner: Any, name: str, act: Act, at: int) -> None:
    """Call `act` before the `at`th call of a function."""
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _places() -> dict[str, tuple[Any, str]]:
    """Name of a phase → (owner, function) that it begins with."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.utils import cpp_extension

    import launch.runtime.tensor_file as tensor_file
    from launch.runtime import export, kernels, processes, saving, session
    from launch.runtime.engine import Engine
    from recipes.causal_lm import CausalLM

    return {
        "start": (session, "prepare"),
        "join": (processes, "join"),
        "kernels": (kernels, "build_for"),
        "compiler": (cpp_extension, "_run_ninja_build"),
        "engine": (DeepSpeedEngine, "_configure_optimizer"),
        "resume": (session, "_resumed"),
        "restore": (session, "restored"),
        "step": (Engine, "train_step"),
        "forward": (CausalLM, "loss"),
        "backward": (DeepSpeedEngine, "backward"),
        "evaluation": (Engine, "_eval_outputs"),
        "save": (saving.Saving, "begin"),
        "write": (tensor_file, "write_tensors"),
        "verify": (tensor_file, "digest_of"),
        "publish": (saving.Saving, "_publish"),
        "rename": (Path, "rename"),
        "prune": (saving.Saving, "_prune"),
        "export": (export, "_write_model"),
        "generation": (CausalLM, "sample"),
        "close": (processes, "leave"),
    }


PHASES = (
    "start", "join", "engine", "resume", "restore", "step", "evaluation", "save", "write", "verify", "publish",
    "rename", "prune", "export", "generation", "close",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a job. who: a rank, `launcher` or `all`. signal: or HANG, VANISH, NO_MEMORY.

    phase: the fault comes `after_s` seconds after the `at`th beginning of that phase on the rank (of the launcher: on
    rank 0); None: `after_s` seconds after the start.
    """

    who: int | str
    signal: int = signal.SIGKILL
    phase: str | None = None
    at: int = 1
    after_s: float = 0.0

    def __str__(self) -> str:
        name = {HANG: "hang", VANISH: "vanish", NO_MEMORY: "no memory", DELAY: "delay"}.get(
            self.signal
        ) or signal.Signals(self.signal).name
        return f"{name} {self.who} " + (f"{self.phase} {self.at}" if self.phase else f"after {self.after_s:.2f} s")


def _rank(
    rank: int, port: int, folder: Path, arguments: tuple[str, ...], faults: tuple[Fault, ...], poisoned: int | None,
    disk: Disk | None,
) -> None:  # fmt: skip
    """One rank, from its first moment to its exit code."""
    code = 1
    try:
        os.chdir(folder)
        write_to(1, folder / f"out_{rank}.log")
        write_to(2, folder / f"out_{rank}.log")
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(rank_environment(rank, WORLD, port), XDG_CACHE_HOME=str(folder.parent / "cache"))
        look_again()
        from launch.runtime.request import run_command
        from launch.train import main

        for fault in faults:
            if fault.phase is not None and fault.who in (rank, "" if rank else "launcher"):
                _before(*_places()[fault.phase], functools.partial(_act, fault, folder), fault.at)
        if poisoned is not None:
            _poison(poisoned)
        if disk is not None:
            arm(disk, folder, folder.with_name(f"{folder.name}.notes"), rank)
        sys.argv = ["launch/train.py", *arguments]
        run_command(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if code == INTERRUPTED and any(fault.who == rank for fault in faults):
            time.sleep(INTERPRETER_S)
        os._exit(code)


def _launcher(
    line: Line, folder: Path, arguments: tuple[str, ...], faults: tuple[Fault, ...], poisoned: int | None,
    extensions: Path | None, disk: Disk | None,
) -> None:  # fmt: skip
    if extensions is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    port = free_port()
    ranks = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            _rank(rank, port, folder, arguments, faults, poisoned, disk)
        ranks.append(pid)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the interpreter ends at a Ctrl-C that nobody catches
    (folder / "pids.json").write_text(json.dumps({"launcher": os.getpid(), "ranks": ranks}))
    os._exit(wait_for(set(ranks)) & 0xFF)


@dataclass(frozen=True)
class Outcome:
    """code: the launcher's exit code. orphans: processes of the job that were there too long after its launcher."""

    code: int | None
    orphans: list[int]
    seconds: float


def run_job(
    folder: Path, *faults: Fault, more: tuple[str, ...] = (), poisoned: int | None = None, limit_s: float = 90,
    extensions: Path | None = None, disk: Disk | None = None, arguments: tuple[str, ...] = ARGUMENTS,
) -> Outcome:  # fmt: skip
    """Run a job in `folder` to its end, whatever that is. poisoned: the loss of this global batch is nan.

    extensions: where kernels are compiled; None: where they are always. disk: what it does to a rank.
    Raises TimeoutError when it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pids.json").unlink(missing_ok=True)
    started = time.monotonic()
    processes = FULL if disk is None else server()
    process = processes.start(_launcher, folder, (*arguments, *more), faults, poisoned, extensions, disk)
    for fault in (fault for fault in faults if fault.phase is None):
        while not (folder / "pids.json").exists() and process.wait(0) is None:
            time.sleep(0.01)
        time.sleep(max(0.0, fault.after_s - (time.monotonic() - started)))
        pids = json.loads((folder / "pids.json").read_text())
        with contextlib.suppress(OSError):
            if fault.who == "all":
                os.killpg(pids["launcher"], fault.signal)
            else:
                os.kill(pids["launcher"] if fault.who == "launcher" else pids["ranks"][fault.who], fault.signal)
    if process.wait(limit_s) is None:
        orphans = _group(process.pid)
        process.kill()
        raise TimeoutError(
            f"{[str(fault) for fault in faults]}: the job of {orphans} still runs after {limit_s} s, see {folder}"
        )
    end = time.monotonic() + CALM_S
    while (orphans := _group(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    return Outcome(process.code, orphans, time.monotonic() - started)


def _group(leader: int | None) -> list[int]:
    """Processes of a group that are not over."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
