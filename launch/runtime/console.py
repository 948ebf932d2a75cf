"""What a person sees: rank 0's progress on the terminal; everything else goes to one log file per rank."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.runtime import interruption
from launch.runtime.standard_streams import unbreakable
from recipes import durable

TAIL_LINES = 20
LINE_EVERY_S = 10.0
"""Without a terminal (a file, CI) a line of progress at most this often."""

STARTING = ".new"
"""Ends the name of a log until `log_is`."""


NARROW, USUAL = 20, 80
"""Columns of a terminal that cannot be one, and of one that says nothing."""


def plain_console(**options: Any) -> Console:
    """What prints to a terminal, or wherever else: lines as they are, of any length."""
    console = Console(highlight=False, soft_wrap=True, **options)
    if console.width < NARROW:  # COLUMNS=0: nothing would be printed at all
        console.width = USUAL
    return console


class Terminal:
    """Rank 0 speaks here; the other ranks are silent. Until `capture` the process's own stdout and stderr are used."""

    def __init__(self, first: bool):
        self.first = first
        self._log: Path | None = None
        self._out: TextIO = sys.stdout
        self.error: TextIO = sys.stderr
        self._saved: tuple[int, int] | None = None
        self.console = plain_console(file=self._out, quiet=not self.first)

    def capture(self, log: Path) -> None:
        """Send all that this process prints from now on (C code included) to `log`, but for what is said here."""
        sys.stdout.flush()
        sys.stderr.flush()
        target = durable.log(log)  # first: where that fails, nothing has changed
        self._log = log
        if log.name.endswith(STARTING):
            interruption.temporary.add(log)
        self._saved = (os.dup(1), os.dup(2))
        self._out = unbreakable(os.dup(self._saved[0]), sys.stdout, closes=True)
        self.error = unbreakable(os.dup(self._saved[1]), sys.stderr, closes=True)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        self.console = plain_console(file=self._out, quiet=not self.first)

    def log_is(self, log: Path) -> None:
        """What was captured elsewhere until now takes the place of `log`, and goes on there."""
        if self._log is not None and self._log != log:
            durable.move(self._log, log)
            interruption.temporary.discard(self._log)
            self._log = log

    def release(self) -> None:
        """Give the process its own stdout and stderr back."""
        if self._saved is None:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, fd in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, fd)
            os.close(saved)
        self._out.close()
        self.error.close()
        if self._log is not None and self._log.name.endswith(STARTING):  # another run's folder, perhaps
            durable.remove(self._log)
        self._saved, self._out, self.error = None, sys.stdout, sys.stderr
        self.console = plain_console(file=self._out, quiet=not self.first)

    @property
    def captured(self) -> bool:
        """Whether what this process prints goes to its log."""
        return self._saved is not None

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    def tail(self) -> str:
        """The last lines of this rank's log, with its path."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            if self._log is None or not self._log.exists():
                return ""
            with self._log.open(errors="replace", encoding="utf-8") as file:
                lines = deque(file, TAIL_LINES)
        except OSError:  # the error that is told is another one
            return ""
        return f"last lines of {self._log}:\n" + "".join(f"  {line}" for line in lines)


class Bar:
    """A progress bar on a terminal, or a line now and then where there is none."""

    def __init__(self, terminal: Terminal, what: str, total: int):
        self._terminal, self._what, self._total = terminal, what, total
        self._last = self._start = time.monotonic()
        self._rich: Progress | None = None
        if terminal.first and terminal.console.is_terminal:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=terminal.console,
                # What libraries print is for the log; rich would take it to the terminal.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._rich.start()
            self._task = self._rich.add_task(what, total=total, note="")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        if total is not None:
            self._total = total
        if self._rich is not None:
            self._rich.update(self._task, completed=done, note=note, total=self._total)
            return
        now = time.monotonic()
        if done and (now - self._last >= LINE_EVERY_S or done >= self._total):
            self._last = now
            left = (now - self._start) / done * (self._total - done)
            self._terminal.say(f"{self._what} {done}/{self._total}  {note}  {left:.0f} s left")

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
