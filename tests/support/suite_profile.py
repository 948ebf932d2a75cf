"""Where the suite's time goes, by file and by cause: `make test-profile` (ARGS="tests/launch", say).

A pytest plugin notes when each test ran; every Python process below notes what it did (`profiling/sitecustomize.py`).
Every moment of a test is then shared out evenly among the processes that were at work in it, so that causes add up to
the time on the clock. `python tests/support/suite_profile.py FOLDER` prints the table of a profile again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROFILING = str(HERE / "profiling")
CAUSES = (
    "interpreter start", "imports", "composing and checks", "data", "kernel build", "meeting of ranks", "engine build",
    "training", "collectives", "evaluation", "generation", "checkpoint", "export", "plot", "planning", "other",
)  # fmt: skip


class Clock:
    """The pytest plugin: (nodeid, start, end) of setup, call and teardown of each test, in a file."""

    def __init__(self, folder: Path):
        self._file = (folder / "tests.txt").open("w", buffering=1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._file.write(f"{report.start:.4f} {report.stop:.4f} {report.nodeid}\n")


def _children_too() -> None:
    """Tests give their commands an environment of their own, without PYTHONPATH."""
    start = subprocess.Popen.__init__

    def profiled(self: Any, *args: Any, **kwargs: Any) -> None:
        environment = dict(os.environ if kwargs.get("env") is None else kwargs["env"])
        others = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part not in ("", PROFILING)]
        kwargs["env"] = {**environment, "PYTHONPATH": os.pathsep.join([PROFILING, *others])}
        start(self, *args, **kwargs)

    subprocess.Popen.__init__ = profiled  # type: ignore[method-assign]


def read(folder: Path) -> tuple[list[tuple[float, float, str]], list[tuple[float, float, str]]]:
    """(tests, intervals of all processes), each (start, end, name)."""

    def lines(file: Path) -> list[tuple[float, float, str]]:
        parts = (line.rstrip("\n").split(" ", 2) for line in file.read_text().splitlines())
        return [(float(part[0]), float(part[1]), part[2]) for part in parts if len(part) == 3]

    return lines(folder / "tests.txt"), [one for file in folder.glob("*.intervals") for one in lines(file)]


def shares(tests: list[tuple[float, float, str]], intervals: list[tuple[float, float, str]]) -> dict[str, dict]:
    """File → cause → seconds. "waiting" is when no process noted anything: the test waits, or computes by itself."""
    events: list[tuple[float, int, str, str]] = []
    for start, end, name in tests:
        file = name.partition("::")[0]
        events += [(start, 1, "test", file), (end, -1, "test", file)]
    for start, end, cause in intervals:
        events += [(start, 1, "work", cause), (end, -1, "work", cause)]
    events.sort(key=lambda event: (event[0], event[1]))
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    active: dict[str, int] = defaultdict(int)
    file, last = "", 0.0
    for moment, change, kind, name in events:
        span = moment - last
        if file and span > 0:
            # A process that only waits for others is "other"; where somebody works, the time is theirs.
            working = {cause: count for cause, count in active.items() if count and cause != "other"}
            total = sum(working.values())
            for cause, count in working.items():
                found[file][cause] += span * count / total
            if not total:
                found[file]["other"] += span
        last = moment
        if kind == "test":
            file = name if change > 0 else ("" if name == file else file)
        else:
            active[name] += change
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: files by their time, causes as columns, and the sum of all."""
    causes = [cause for cause in CAUSES if any(cause in seconds for seconds in found.values())]
    totals = {cause: sum(seconds.get(cause, 0.0) for seconds in found.values()) for cause in causes}
    causes.sort(key=lambda cause: -totals[cause])

    def row(name: str, seconds: dict[str, float]) -> str:
        cells = [f"{seconds.get(cause, 0.0):.0f}" if seconds.get(cause, 0.0) >= 0.5 else "" for cause in causes]
        return f"| {name} | {sum(seconds.values()):.0f} | " + " | ".join(cells) + " |"

    rows = [row(name, found[name]) for name in sorted(found, key=lambda name: -sum(found[name].values()))]
    head = ["| file | seconds | " + " | ".join(causes) + " |", "| --- |" + " ---: |" * (len(causes) + 1)]
    return "\n".join([*head, row("**all**", totals), *rows])


def main(argv: list[str]) -> int:
    if len(argv) == 1 and (Path(argv[0]) / "tests.txt").is_file():
        print(table(shares(*read(Path(argv[0])))))
        return 0
    import pytest

    folder = Path(tempfile.mkdtemp(prefix="test_profile_"))
    os.environ["TEST_PROFILE"] = str(folder)
    if PROFILING not in os.environ.get("PYTHONPATH", ""):
        os.environ["PYTHONPATH"] = PROFILING
        os.execv(sys.executable, [sys.executable, __file__, *argv])  # so that this process is timed, too
    _children_too()
    started = time.monotonic()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(argv or [str(ROOT / "tests")])], plugins=[Clock(folder)])
    print(f"\n{time.monotonic() - started:.0f} s, profile in {folder}\n")
    print(table(shares(*read(folder))))
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
