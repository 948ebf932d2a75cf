"""Commands of `launch/` without their start: what `python`, `torchrun` and `deepspeed` do, in forked processes.

Only what the start itself is about (launchers, exit codes of launchers, signals to them, imports) needs the real one.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from support.server import Line, Server, exit_code

FULL = Server("FULL", ["support.preloaded"], HF_HUB_OFFLINE="1")
LIGHT = Server("LIGHT", ["conf.compose", "hydra", "launch.runtime.request", "support.warm"], forbidden="torch")
"""For requests that must be refused before torch is imported."""


def run(
    kind: str, ranks: int, port: int, script: Path, arguments: list[str], cwd: Path, environment: Mapping[str, str],
    timeout_s: float, server: Server = FULL,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a script of the project as a launcher would. kind: python, torchrun or deepspeed.

    Raises subprocess.TimeoutExpired, as subprocess.run does; no process of it is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        child = server.start(_command, kind, ranks, port, script, arguments, cwd, dict(environment), files)
        code = child.wait(timeout_s)
        if code is None:
            child.kill()
            said = [file.read_bytes() if file.exists() else b"" for file in files]
            raise subprocess.TimeoutExpired([kind, str(script), *arguments], timeout_s, *said)
        out, err = (file.read_text() if file.exists() else "" for file in files)
    return subprocess.CompletedProcess([kind, str(script), *arguments], code, out, err)


def _command(
    line: Line, kind: str, ranks: int, port: int, script: Path, arguments: list[str], cwd: Path,
    environment: dict[str, str], files: tuple[Path, Path],
) -> None:  # fmt: skip
    for number, file in enumerate(files, 1):
        write_to(number, file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if kind == "python":
        become(script, arguments)

    def start(rank: int) -> None:
        os.environ.update(rank_environment(rank, ranks, port, kind))
        become(script, [*([f"--local_rank={rank}"] if kind == "deepspeed" else []), *arguments])

    raise SystemExit(launch(ranks, start))


def write_to(descriptor: int, file: Path) -> None:
    """Let what this process writes to a descriptor go to the end of a file."""
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, descriptor)
    os.close(target)


def rank_environment(rank: int, world: int, port: int, kind: str = "torchrun") -> dict[str, str]:
    """What a launcher tells a rank of one machine."""
    sizes = {"LOCAL_SIZE" if kind == "deepspeed" else "LOCAL_WORLD_SIZE": str(world), "WORLD_SIZE": str(world)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **meeting}


def become(script: Path, arguments: list[str]) -> None:
    """Run a script as the interpreter does, to its exit. Does not return."""
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    look_again()
    code = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def look_again() -> None:
    """Who started this process, which was looked up when its server began."""
    from launch.runtime import parents

    importlib.reload(parents)


def launch(ranks: int, start: Callable[[int], None]) -> int:
    """Fork ranks; when one fails the others are ended. Returns the exit code of the first to fail.

    start: called in each with its number; must not return.
    """
    running = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            start(rank)
        running.add(pid)
    return wait_for(running)


def wait_for(running: set[int]) -> int:
    """As launchers do: the exit code of the first process that fails, whose end is the end of the others."""
    code = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            _end(running)
    return code


def _end(running: set[int], patience_s: float = 5.0) -> None:
    """Ask, wait, and kill. They stay zombies until they are waited for."""
    for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 0.0)):
        for pid in running:
            os.kill(pid, number)
        end = time.monotonic() + wait_s
        while time.monotonic() < end and any(_works(pid) for pid in running):
            time.sleep(0.05)


def _works(pid: int) -> bool:
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return status is None
