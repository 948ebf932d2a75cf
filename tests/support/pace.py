"""The suite's time: tests that must be alone, long files first, and at the end what took how long.

`make test` passes `--pace`. Machines differ, so its time is also told as a multiple of a short calibration run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUDGET = 1450.0
"""What twenty minutes are on the machine that the budget was set on, in calibration runs."""
SHOWN = 10
LONG = (
    "tests/distributed/test_resume.py", "tests/launch/test_layout_commands.py", "tests/launch/test_supervise.py",
    "tests/faults/test_faults.py", "tests/distributed/test_task_layouts.py", "tests/launch/test_finetune.py",
    "tests/distributed/test_engine.py", "tests/distributed/test_layout_models.py", "tests/notebooks/test_notebooks.py",
    "tests/launch/test_tasks.py", "tests/distributed/test_parity.py", "tests/distributed/test_layouts.py",
)  # fmt: skip
"""They begin first, so that two workers end together."""
FOLDER = "TESTS_FOLDER"
"""In the environment of all workers of a run: a folder that they share, with the lock of `alone`."""
WORK = """
import hashlib, json, time
started = time.perf_counter()
for turn in range(160):
    rows = [{"step": n, "loss": n / 7, "text": "x" * (n % 50)} for n in range(800)]
    sorted(json.loads(json.dumps(rows)), key=lambda row: row["text"] + str(row["loss"]))
    hashlib.sha256(b"0" * 2_000_000).hexdigest()
print(time.perf_counter() - started)
"""


def calibration() -> float:
    """Seconds that a fixed piece of work takes on this machine, on two cores at once as the suite's."""
    both = [subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(one.communicate()[0]) for one in both) / 2


class Pace:
    """The plugin of the process that started the run."""

    def __init__(self, calibrated: float):
        self._calibrated, self._started = calibrated, time.monotonic()
        self._files: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._files[report.nodeid.partition("::")[0]] += report.duration

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        seconds = time.monotonic() - self._started
        terminalreporter.section(f"{SHOWN} slowest files")
        for file, took in sorted(self._files.items(), key=lambda entry: -entry[1])[:SHOWN]:
            terminalreporter.write_line(f"{took:6.0f} s  {file}")
        multiple = seconds / self._calibrated
        terminalreporter.write_line(
            f"{seconds:.0f} s, {multiple:.0f} times the calibration run ({self._calibrated:.2f} s); budget {BUDGET:.0f}"
        )
        self.late = multiple > BUDGET

    late = False

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        if self.late:
            print(
                f"THE SUITE IS OVER ITS BUDGET of {BUDGET:.0f} calibration runs (twenty minutes): see tests/README.md"
            )


def long_first(items: list[pytest.Item]) -> None:
    """Sort the files of a run, the tests of each as they are."""
    order = {file: number for number, file in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(LONG)))


@contextlib.contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Wait until a test may run: one that is alone waits for the others to end, and they for it."""
    with open(shared() / "door", "w") as door, open(shared() / "room", "w") as room:
        # Who waits to be alone holds the door: nobody else comes in any more.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


def shared() -> Path:
    """The folder that all workers of this run share."""
    return Path(os.environ[FOLDER])


@contextlib.contextmanager
def run_folder() -> Iterator[None]:
    """In the process that starts the workers: make it, and take it away at the end."""
    with tempfile.TemporaryDirectory(prefix="tests_", ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER] = folder
        yield
