"""Processes without their start: forked from a server that has imported what they need.

Torch, deepspeed and transformers take 5 to 8 s to import on a busy machine, a fork takes some milliseconds. A server
never computes, so that its children inherit no threads (a fork of a process whose OpenMP pool has run hangs). It ends,
and takes its children with it, when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STARTED_S = 120.0
"""What the imports may take on a machine that does other things."""


class Child:
    """A forked process. `send` and `receive` reach its function's `Connection`; its exit code comes last."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.pid: int = connection.recv()
        self.code: int | None = None
        self._received: list[Any] = []

    def send(self, value: Any) -> None:
        self.connection.send(("message", value))

    def receive(self) -> Any:
        """The next value that the process sent. Raises EOFError when it has ended without."""
        while not self._received:
            if self.code is not None:
                raise EOFError
            self._read()
        return self._received.pop(0)

    def _read(self) -> None:
        kind, value = self.connection.recv()
        if kind == "exit":
            self.code = value
        else:
            self._received.append(value)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code (-N: killed by signal N); None when the process is not over by then."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.code is None:
            if not self.connection.poll(None if end is None else max(0.0, end - time.monotonic())):
                return None
            self._read()
        return self.code

    def kill(self) -> None:
        """End it and every process of its session; returns when it is over."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self.connection.close()


class Server:
    """Started when it is first needed, or by `begin`; processes below this one find it in their environment.

    preload: modules. forbidden: a module whose import ends a child.
    """

    def __init__(self, name: str, preload: Sequence[str], forbidden: str = "", **environment: str):
        self._variable = f"TESTS_SERVER_{name}"
        self._preload, self._forbidden, self._environment = list(preload), forbidden, environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Run `function(line, *arguments)` in a new process, the leader of a session of its own.

        The function is found by its name, as pickle finds it. Its process ends with exit code 0, or 1 for an exception.
        """
        self.begin()
        connection = self._connected()
        connection.send_bytes(pickle.dumps((_paths(), pickle.dumps((function, arguments)))))
        return Child(connection)

    def begin(self) -> None:
        """Let the server start, without waiting for it."""
        if self._variable in os.environ:
            return
        address = str(Path(tempfile.mkdtemp(prefix="warm_")) / "socket")
        program = f"""
import sys
sys.path[:0] = {_paths()!r}
from support.server import serve
serve({address!r}, {self._preload!r}, {self._forbidden!r})
"""
        # Its standard input is its life line: closed when this process ends, however it does.
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **self._environment},
        )
        os.environ[self._variable] = address

    def _connected(self) -> Connection:
        end = time.monotonic() + STARTED_S
        while time.monotonic() < end and (self._process is None or self._process.poll() is None):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Client(os.environ[self._variable])
            time.sleep(0.05)
        raise RuntimeError(f"the server of {', '.join(self._preload)} did not start")


def _paths() -> list[str]:
    """Where a child finds what the caller finds: the suite's own modules too."""
    return [path for path in dict.fromkeys([str(ROOT), str(ROOT / "tests"), *sys.path]) if path]


def serve(address: str, preload: Sequence[str], forbidden: str) -> None:
    """The server's whole life."""
    for name in preload:
        importlib.import_module(name)
    if forbidden:
        assert forbidden not in sys.modules, f"{forbidden} is imported by {', '.join(preload)}"
        sys.meta_path.insert(0, _Forbidden(forbidden))
    # What is there by now is not looked through by any child's collector, nor copied by its marks.
    gc.collect()
    gc.freeze()
    listener = Listener(address, family="AF_UNIX", backlog=64)
    socket: Any = listener._listener._socket  # type: ignore[attr-defined]
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, Connection] = {}
    while True:
        ready, _, _ = select.select([socket, woken, 0], [], [])
        if 0 in ready:
            for pid in children:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        if woken in ready:
            os.read(woken, 1024)
            _report(children)
        if socket in ready:
            connection = listener.accept()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                socket.close()
                for other in children.values():
                    other.close()
                os.close(woken)
                os.close(wake)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                _live(connection)
            children[pid] = connection


def _report(children: dict[int, Connection]) -> None:
    """Tell whoever started them of those that are over."""
    while children:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection = children.pop(pid)
        with contextlib.suppress(OSError):
            connection.send(("exit", os.waitstatus_to_exitcode(status)))
        connection.close()


def _live(connection: Connection) -> None:
    """A child's whole life."""
    code = 1
    try:
        os.setsid()
        connection.send(os.getpid())
        paths, call = pickle.loads(connection.recv_bytes())
        sys.path[:] = paths
        function, arguments = pickle.loads(call)
        function(Line(connection), *arguments)
        code = 0
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def exit_code(end: SystemExit) -> int:
    """What the interpreter would make of it."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


class Line:
    """A child's end of its connection."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def send(self, value: Any) -> None:
        self._connection.send(("message", value))

    def receive(self) -> Any:
        return self._connection.recv()[1]


class _Forbidden(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module that must not be loaded, and ends the process that loads it."""

    def __init__(self, name: str):
        self._name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name == self._name else None

    def create_module(self, spec: Any) -> None:
        raise SystemExit(f"{self._name} was imported")

    def exec_module(self, module: Any) -> None:
        """Never reached."""
