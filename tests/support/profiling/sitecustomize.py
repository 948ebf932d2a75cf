"""Where the time of a test suite goes: loaded by every Python process below `make test-profile`, before anything else.

Each process notes exclusive intervals (start, end, cause) of its main thread and appends them to a file of its own in
$TEST_PROFILE. Nothing of the project knows of it: what it times is wrapped when its module has been imported.
"""

from __future__ import annotations

import atexit
import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

FOLDER = os.environ.get("TEST_PROFILE", "")
LEAST_S = 0.0005
"""Shorter intervals are not worth a line; they count as what is around them."""
FLUSH_S = 1.0
"""A killed process loses no more than this."""

WRAPPED: dict[str, dict[str, str]] = {
    "launch.runtime.kernels": {"build": "kernel build"},
    "launch.runtime.processes": {"join": "meeting of ranks", "leave": "meeting of ranks"},
    "launch.runtime.staged": {"make_engine": "engine build"},
    "launch.runtime.engine": {"Engine.train_step": "training", "Engine.evaluate": "evaluation"},
    "launch.runtime.saving": {"Saving.begin": "checkpoint", "Saving.finish": "checkpoint"},
    "launch.runtime.export": {"export": "export"},
    "launch.runtime.plots": {"plot_loss": "plot"},
    "launch.runtime.request": {"read_request": "composing and checks"},
    "launch.runtime.session": {"prepare": "data"},
    "launch.planner.plan": {"make_plan": "planning"},
    "transformers.generation.utils": {"GenerationMixin.generate": "generation"},
    "torch.distributed.distributed_c10d": dict.fromkeys(
        ("all_reduce", "broadcast", "barrier", "all_gather_object", "broadcast_object_list", "gather_object",
         "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "send", "recv", "all_gather",
         "reduce", "new_group"),
        "collectives",
    ),
}  # fmt: skip
"""Module → its functions whose time is a cause of its own."""


class Recorder:
    """A stack of causes; what is on top gets the time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.pid, self.main = os.getpid(), threading.main_thread()
        self.stack = ["other"]
        self.since = self.flushed = time.time()
        self.lines: list[str] = []

    def change(self) -> None:
        """End the interval of what is on top."""
        now = time.time()
        if now - self.since >= LEAST_S:
            self.lines.append(f"{self.since:.4f} {now:.4f} {self.stack[-1]}\n")
            self.since = now
            if now - self.flushed > FLUSH_S:
                self.flush()

    def enter(self, cause: str) -> None:
        self.change()
        self.stack.append(cause)

    def leave(self) -> None:
        self.change()
        self.stack.pop()

    def flush(self) -> None:
        self.flushed = time.time()
        lines, self.lines = self.lines, []
        try:
            with open(os.path.join(FOLDER, f"{self.pid}.intervals"), "a") as file:
                file.writelines(lines)
        except OSError:
            pass

    @property
    def here(self) -> bool:
        return threading.current_thread() is self.main


RECORDER = Recorder()


def timed(function: Callable[..., Any], cause: str) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not RECORDER.here:
            return function(*args, **kwargs)
        RECORDER.enter(cause)
        try:
            return function(*args, **kwargs)
        finally:
            RECORDER.leave()

    wrapper.__wrapped__ = function  # type: ignore[attr-defined]
    wrapper.__name__, wrapper.__doc__ = getattr(function, "__name__", cause), function.__doc__
    return wrapper


def wrap(module: Any, names: dict[str, str]) -> None:
    for path, cause in names.items():
        owner, _, name = path.rpartition(".")
        target = getattr(module, owner, None) if owner else module
        if target is not None and hasattr(target, name):
            setattr(target, name, timed(getattr(target, name), cause))


class Watcher(importlib.abc.MetaPathFinder):
    """Wraps the functions of a module as soon as it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WRAPPED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: Any, execute: Any = execute, name: str = name) -> None:
                    execute(module)
                    wrap(module, WRAPPED[name])

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


def _outermost_imports() -> None:
    """The time of import statements, whichever module they load."""
    depth = 0

    def outermost(original: Callable[..., Any]) -> Callable[..., Any]:
        def importing(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth or not RECORDER.here:
                return original(*args, **kwargs)
            depth = 1
            RECORDER.enter("imports")
            try:
                return original(*args, **kwargs)
            finally:
                RECORDER.leave()
                depth = 0

        return importing

    builtins.__import__ = outermost(builtins.__import__)
    importlib.import_module = outermost(importlib.import_module)


def _started() -> float:
    """When the system made this process (Linux), to a hundredth of a second."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime") as file:
        up = float(file.read().split()[0])
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))


def _hidden() -> None:
    """Run the `sitecustomize` that this one stands before."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if FOLDER:
    with open(os.path.join(FOLDER, f"{os.getpid()}.intervals"), "a") as file:
        file.write(f"{min(_started(), time.time()):.4f} {time.time():.4f} interpreter start\n")
    leave_now = os._exit

    def _exit(code: int) -> None:
        RECORDER.change()
        RECORDER.flush()
        leave_now(code)

    os._exit = _exit  # type: ignore[assignment]
    os.register_at_fork(after_in_child=RECORDER.reset)
    atexit.register(lambda: (RECORDER.change(), RECORDER.flush()))
    _outermost_imports()
    sys.meta_path.insert(0, Watcher())
_hidden()
