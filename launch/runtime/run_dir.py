"""The run directory: one for all ranks, written by rank 0 alone (but for each rank's own log)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.errors import Problem, RequestError
from conf.rules_run import RUN_FILES, RUN_FOLDERS
from launch.runtime.checkpoint import all_of, unfinished
from recipes import durable

PROBE_BYTES = 1 << 20


class DiskError(Exception):
    """What a run cannot be without could not be written; a message for a person, the same on all ranks."""


class RunDir:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self.logs = self.path / "logs"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock")

    def create(self) -> None:
        """Make the folder and show that it can be written. Raises RequestError (run_dir) where it cannot."""
        try:
            durable.make_folder(self.logs)
            _write_probe(self.logs / f".probe.{os.getpid()}")  # one per rank: all of them try, at the same time
        except OSError as error:
            rule = f"cannot be written: {error.strerror}"
            raise RequestError(Problem("run_dir", str(self.path), rule, "run_dir=FOLDER on a writable disk")) from None

    def clear(self) -> None:
        """Delete all that an earlier run wrote but its logs, and nothing else. Only for who has claimed the folder.

        What a user has put among the checkpoints stays.
        """
        own = [self.path / name for name in (*RUN_FILES, *RUN_FOLDERS) if name not in ("logs", "checkpoints")]
        own += [*(entry for entry, _ in all_of(self.checkpoints)), *unfinished(self.checkpoints)]
        if left := [path for path in own if not durable.remove(path)]:
            raise DiskError(f"{left[0]} is of an earlier run, and cannot be deleted; another run_dir has room")
        with contextlib.suppress(OSError):
            self.checkpoints.rmdir()
        # Else a loss of power might bring back what a resume would take for this run's.
        for folder in (self.checkpoints, self.path):
            if folder.is_dir():
                durable.synchronise(folder)

    def claim(self, ranks: int) -> None:
        """Keep this folder for this process, until it ends, and remove logs of ranks that this run does not have.

        Raises RequestError when another run is at work in it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            rule = "another run is at work in it"
            raise RequestError(Problem("run_dir", str(self.path), rule, f"run_dir={self.path}-2")) from None
        for note in self.logs.glob("stall_*"):  # of an earlier run; another rank's watchdog must not meet them
            durable.remove(note)
        for log in self.logs.glob("rank_*.log"):
            if log.stem[5:].isdigit() and int(log.stem[5:]) >= ranks:
                durable.remove(log)

    def leave(self) -> None:
        """Let other runs have this folder."""
        self._lock.release()

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def append_json(self, name: str, row: Any) -> None:
        """Add a line to a small file of them."""
        durable.make_folder(self.path)
        durable.append_lines(self.path / name, json.dumps(row) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        durable.make_folder(self.path)  # it may be gone, hours after the start
        durable.replace_text(self.path / name, text)


def json_lines(rows: Iterable[Any]) -> str:
    """A text with one line for each row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_probe(path: Path) -> None:
    """Write and remove a small file; raises OSError where that fails, and leaves nothing behind."""
    try:
        with durable.new_file(path) as file:
            file.write(b"\0" * PROBE_BYTES)
    finally:
        durable.remove(path)
