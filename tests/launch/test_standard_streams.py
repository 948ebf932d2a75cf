"""Whatever becomes of the terminal, a run goes on; a command whose answer is lost says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import PLAN, ROOT, TRAIN, environment

from launch.runtime import standard_streams
from launch.runtime.console import Bar, Terminal
from launch.runtime.interruption import InterruptedRunError, Wishes
from launch.runtime.standard_streams import missing, unbreakable

HELP = [sys.executable, str(PLAN), "--help"]


@pytest.fixture
def closed_pipe():
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full_disk():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def test_what_cannot_be_written_is_lost(closed_pipe, full_disk):
    for descriptor, noticed in ((closed_pipe, False), (full_disk, True)):
        stream = unbreakable(descriptor)
        for _ in range(2):
            print("step 1\n" * 10_000, file=stream, flush=True)
        stream.close()
        os.fstat(descriptor)  # it is not the stream's to close
        assert (missing(stream) is not None) == noticed
    assert missing(sys.stdout) is None


def test_no_encoding_is_too_small(tmp_path):
    for encoding, expected in (("ascii", b"Gr\\xfcn \\u2026 \\ud83d\n"), ("utf-8", "Grün … \\ud83d\n".encode())):
        file = tmp_path / encoding
        with file.open("w", encoding=encoding) as like:
            stream = unbreakable(os.open(file, os.O_WRONLY), like, closes=True)
            print("Grün … \ud83d", file=stream)
            stream.close()
        assert file.read_bytes() == expected


def test_a_terminal_that_is_gone(closed_pipe, full_disk, tmp_path, monkeypatch):
    """Rich's bars and lines, problems, and what C code prints."""
    for descriptor in (closed_pipe, full_disk):
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            monkeypatch.setattr(sys, "stdout", unbreakable(1))
            monkeypatch.setattr(sys, "stderr", unbreakable(2))
            terminal = Terminal(first=True)
            terminal.say("before")
            terminal.capture(tmp_path / "rank_0.log")
            print("to the log")
            with Bar(terminal, "training", 2) as bar:
                bar.update(2, "loss 1")
            terminal.console._force_terminal = True
            with Bar(terminal, "training", 2) as bar:
                bar.update(2, "loss 1")
            print("error: …", file=terminal.error, flush=True)
            terminal.release()
            print("after")
        finally:
            for number, saved in enumerate(kept, 1):
                os.dup2(saved, number)
                os.close(saved)
        assert (tmp_path / "rank_0.log").read_text("utf-8") == "to the log\n"


def _shell(script: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", f"set -o pipefail; {script}", "bash", *HELP]
    env = environment(cwd / "cache", **extra)
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=60)


@pytest.mark.parametrize("script, code, said", [
    ('"$@" | true', 0, ""), ('"$@" | head -1', 0, ""), ('"$@" >&-', 0, ""), ('"$@" >&- 2>&- <&-', 0, ""),
    ('"$@" >/dev/full', 1, "error: standard output could not be written in full: No space left on device\n"),
])  # fmt: skip
def test_a_command_without_its_reader(script, code, said, tmp_path):
    done = _shell(script, tmp_path)
    assert (done.returncode, done.stderr) == (code, said)


def test_the_locale_decides_nothing(tmp_path):
    """Problems with letters that ASCII does not have, in a locale of ASCII and on a terminal that says it is one."""
    script = f'"$1" {TRAIN} +recipe=quickstart data=text "data.path=\'größe.txt\'"'
    plain = _shell(script, tmp_path)
    assert plain.returncode == 2 and "data.path=größe.txt: there is no such file" in plain.stderr
    for extra in ({}, {"PYTHONIOENCODING": "ascii:strict"}):
        done = _shell(script, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", **extra)
        assert done.returncode == 2
        assert done.stderr == (plain.stderr.encode("ascii", "backslashreplace").decode() if extra else plain.stderr)


def test_utf8_mode_is_begun_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    standard_streams.in_utf8()
    assert not started
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "x"])
    standard_streams.in_utf8()
    ((program, words, env),) = started
    assert program == sys.executable and words[1:] == ["-u", "train.py", "x"] and env["PYTHONUTF8"] == "1"
    monkeypatch.setenv("PYTHONUTF8", "1")  # and still no UTF-8: python -E, say
    standard_streams.in_utf8()
    assert len(started) == 1


def _deaf(number: int, frame: object) -> None:
    """What this process does at a SIGHUP by itself."""


@pytest.mark.parametrize("before, stops", [(_deaf, True), (signal.SIG_IGN, False)])
def test_a_hangup_stops_unless_it_was_ignored_at_the_start(before, stops):
    assert threading.current_thread() is threading.main_thread()
    own = signal.signal(signal.SIGHUP, before)
    try:
        wishes = Wishes(20, lambda: 1)
        wishes.look_later()
        with wishes.heard():
            signal.raise_signal(signal.SIGHUP)
        assert wishes.stop == stops and signal.getsignal(signal.SIGHUP) == before
        if stops:  # also at the start, where nothing looks for wishes yet
            with pytest.raises(InterruptedRunError), (wishes := Wishes(20, lambda: 1)).heard():
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, own)


def test_streams_that_are_replaced_close_nothing():
    code = "import gc, os, sys; from launch.runtime.standard_streams import secure; sys.stdout = os.fdopen(1, 'w')"
    words = [sys.executable, "-c", f"{code}; secure(); gc.collect(); print('here')"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).stdout == b"here\n"


def test_the_streams_need_nothing_else():
    """They come before all that may print."""
    code = "import sys, launch.runtime.standard_streams; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
