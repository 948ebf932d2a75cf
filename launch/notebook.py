"""A run inside a notebook's own process, from the same request and through the same session as the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.runtime.console import Terminal
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
        sys.stdout = sys.stderr = log.open("a", buffering=1)

    def release(self) -> None:
        sys.stdout, sys.stderr = self._streams
        super().release()


def _plain() -> Console:
    """Text on the page's stream: neither an HTML block for each line nor the cursor movements of a terminal."""
    return Console(file=sys.stdout, force_jupyter=False, force_terminal=False, highlight=False, soft_wrap=True)


def run(request: Request) -> dict[str, Any]:
    """Train as requested, on the one rank that a notebook is, and return the summary (the content of summary.json)."""
    cell = Cell()
    try:
        return train(request, cell)
    finally:
        cell.release()
