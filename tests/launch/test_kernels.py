"""launch/runtime/kernels.py: a compilation that is broken off leaves no compiler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.runtime.kernels import no_compiler_left

COMPILER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)', sys.argv[1]])"
"""As ninja: a process that waits for others, and does not end them when it is killed."""


def compilers(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(number: int, mark: str) -> list[psutil.Process]:
    """The compilers, once there are so many."""
    end = time.monotonic() + 20
    while len(found := compilers(mark)) != number and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_an_exception_ends_them(tmp_path: Path) -> None:
    mark = str(tmp_path)
    with pytest.raises(KeyboardInterrupt), no_compiler_left():
        ninja = subprocess.Popen([sys.executable, "-c", COMPILER, mark])
        assert len(until(2, mark)) == 2
        ninja.kill()  # what subprocess.run does when a handler raises
        ninja.wait()
        assert len(until(1, mark)) == 1
        raise KeyboardInterrupt
    assert not compilers(mark)


def test_so_does_the_death_of_who_compiles(tmp_path: Path) -> None:
    mark = str(tmp_path)
    program = (
        "import subprocess, sys\nfrom launch.runtime.kernels import no_compiler_left\nwith no_compiler_left():\n"
        f"    subprocess.run([sys.executable, '-c', {COMPILER!r}, {mark!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert len(until(2, mark)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not until(0, mark)


def test_one_that_comes_to_its_end_is_left_alone(tmp_path: Path) -> None:
    mark = str(tmp_path)
    with no_compiler_left():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", mark])
        until(1, mark)
    assert len(compilers(mark)) == 1
    assert "DEEPSPEED_RECIPES_BUILD" not in os.environ
    child.kill()
    child.wait()
