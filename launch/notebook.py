"""Runs from a notebook: in its own process through the session of the commands, or on several ranks by the launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.runtime.console import Terminal, plain_console
from launch.runtime.processes import free_port
from launch.runtime.request import Request
from launch.runtime.session import train


class Cell(Terminal):
    """The terminal of a notebook: what is said appears under the cell, the chatter goes to the run's log."""

    def __init__(self) -> None:
        super().__init__(first=True)
        self._streams = sys.stdout, sys.stderr
        self.console = _plain()

    def capture(self, log: Path) -> None:
        """As on a terminal, and Python's own streams too: a kernel's are sockets to the page, not descriptors 1 and 2.

        The log stays open: the engine's logger keeps the stream that it met when it was imported.
        """
        super().capture(log)
        self.console = _plain()
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")

    def release(self) -> None:
        sys.stdout, sys.stderr = self._streams
        super().release()


def _plain() -> Console:
    """Text on the page's stream: neither an HTML block for each line nor the cursor movements of a terminal."""
    return plain_console(file=sys.stdout, force_jupyter=False, force_terminal=False)


def run(request: Request) -> dict[str, Any]:
    """Train as requested, on the one rank that a notebook is, and return the summary (the content of summary.json)."""
    cell = Cell()
    try:
        return train(request, cell)
    finally:
        cell.release()


def run_ranks(overrides: list[str], ranks: int) -> Path:
    """Train `overrides` on several ranks of this machine, by the launcher, and return the run directory.

    A notebook is one process, so the ranks are others. Their output is shown when it is over. Raises RuntimeError with
    its last lines when the run fails.
    """
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        str(Path(__file__).with_name("train.py")), *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n" + "\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    said = [line for line in done.stdout.splitlines() if line.startswith(("step ", "held-out loss"))]
    print("\n".join(said))
    return Path(next(override for override in overrides if override.startswith("run_dir=")).removeprefix("run_dir="))
