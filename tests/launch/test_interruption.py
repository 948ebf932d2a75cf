"""Signals where no run is needed to see what they do: before the first step, and at the very end; and the watchdog."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import ROOT
from filelock import FileLock

from launch.runtime.interruption import STOPPING, InterruptedRunError, Wishes
from launch.runtime.watchdog import Watchdog


def python(program: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", f"import os, signal\nfrom launch.runtime.interruption import *\n{program}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_no_library_goes_on_after_it(number: int) -> None:
    """Before the first step; many catch every Exception, and some turn it into one of their own."""
    with pytest.raises(InterruptedRunError, match="before the first step") as stopped, Wishes().heard():
        try:
            stop(number)
        except Exception:
            pytest.fail("swallowed")
    assert stopped.value.resumable

    def library() -> None:
        try:
            stop(number)
        except BaseException as error:
            raise OSError("the compiler failed") from error

    with pytest.raises(InterruptedRunError, match="before the first step"), Wishes().heard():
        library()


def test_a_wish_is_only_noted_once_steps_are_taken() -> None:
    wishes = Wishes()
    before = signal.getsignal(signal.SIGTERM)
    with wishes.heard():
        wishes.look_later()
        with wishes.heard():  # the command hears, and so does what it calls
            stop(signal.SIGUSR1)
            assert (wishes.stop, wishes.save) == (False, True)
        stop()
        stop()  # the launcher's
        assert wishes.stop
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_main_thread_outside_of_python_is_not_waited_for() -> None:
    """Nothing has to be kept yet. With the steps' deadline of 60 s it would hold up everyone else."""
    program = """
import ctypes, threading
lock = ctypes.create_string_buffer(64)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
with Wishes(grace_s=60).heard():
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""
    started = time.monotonic()
    done = python(program)
    assert done.returncode == 75 and time.monotonic() - started < 20, done


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 75), ("raise InterruptedRunError('stopped')", 75), ("raise ValueError", -signal.SIGTERM)],
)
def test_an_exit_code_that_stands_is_not_changed(body: str, code: int) -> None:
    """What has failed can be ended."""
    program = f"""
try:
    with Wishes().heard(to_the_end=True):
        {body}
except (InterruptedRunError, ValueError):
    pass
for number in SIGNALS:
    os.kill(os.getpid(), number)
raise SystemExit(75)
"""
    assert python(program).returncode == code


def test_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Wishes().heard():
            stop(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_on_the_data_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clocks of the test's own: other threads of the suite are at work in this process."""
    worked, passed = 0.0, 0.0
    monkeypatch.setattr(time, "process_time", lambda: worked)
    monkeypatch.setattr(time, "monotonic", lambda: passed)
    watchdog = Watchdog(tmp_path, 0, 2, 0.5, pytest.fail)
    watchdog.prepares("reading")
    assert not watchdog._prepares_still()
    worked += 0.01
    assert watchdog._prepares_still()
    watchdog.prepares("reading")
    passed += 0.6
    assert not watchdog._prepares_still(), "it sleeps"
    watchdog.beat("the meeting of the ranks")
    worked += 0.01
    assert not watchdog._prepares_still(), "from here on only beats count"


def test_so_is_waiting_for_the_rank_that_does_it(tmp_path: Path) -> None:
    ready, found = threading.Event(), list[Watchdog]()

    def wait() -> None:
        found.append(Watchdog(tmp_path, 0, 2, 0.3, pytest.fail))
        found[0].prepares("reading")
        ready.set()
        with FileLock(tmp_path / "lock", thread_local=False):
            pass

    with FileLock(tmp_path / "lock", thread_local=False):
        thread = threading.Thread(target=wait)
        thread.start()
        assert ready.wait(10)
        time.sleep(0.5)
        assert found[0]._prepares_still()
    thread.join()


def test_notes_of_an_earlier_run_do_not_end_this_one(tmp_path: Path) -> None:
    note = tmp_path / "stall_00001.json"
    note.write_text(json.dumps({}))
    watchdog = Watchdog(tmp_path, 0, 2, 5, pytest.fail)
    assert not watchdog._others()
    os.utime(note, ns=(1, 1))
    assert watchdog._others()
