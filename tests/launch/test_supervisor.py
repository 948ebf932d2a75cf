"""What launch/supervise.py makes of a folder that is not its own alone; without a run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from conf.compose import compose
from launch.supervise import Supervisor


def supervisor(folder: Path, codes: list[int], restarts: int = 0) -> tuple[Supervisor, list[int]]:
    """One whose runs end with these codes at once; the ranks of each start."""
    words = ["+recipe=quickstart", f"run_dir={folder}", "checkpoint.every=5"]
    own = {"ranks": 1, "least": 1, "restarts": restarts, "backoff_s": 0}
    found, started = Supervisor(words, own, compose([*words, "resume=auto"], 1)), []

    def once(ranks: int) -> int:
        started.append(ranks)
        return codes.pop(0)

    found._once = once  # type: ignore[method-assign]
    return found, started


def test_a_busy_folder_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = FileLock(tmp_path / ".lock", thread_local=False)
    other.acquire()
    one, started = supervisor(tmp_path, [0])
    threading.Timer(0.7, other.release).start()
    assert one.run() == 0 and started == [1]
    assert f"another run is at work in {tmp_path}; waiting for its end" in capsys.readouterr().out
    assert one._record.waited_s > 0.5


def test_a_run_that_was_refused_for_another_one_is_tried_again(tmp_path: Path) -> None:
    """Both were started at the same moment, and the other one was quicker; a wrong request is not tried again."""
    other = FileLock(tmp_path / ".lock", thread_local=False)
    one, started = supervisor(tmp_path, [0])
    later = one._once

    def refused(ranks: int) -> int:
        other.acquire()
        threading.Timer(0.3, other.release).start()
        one._once = later  # type: ignore[method-assign]
        return 2

    one._once = refused  # type: ignore[method-assign]
    assert one.run() == 0 and started == [1]
    one, started = supervisor(tmp_path, [2, 0])
    assert one.run() == 2 and started == [1]


def test_a_stop_while_it_waits(tmp_path: Path) -> None:
    other = FileLock(tmp_path / ".lock", thread_local=False)
    other.acquire()
    one, started = supervisor(tmp_path, [0])
    threading.Timer(0.3, lambda: setattr(one, "_asked", True)).start()
    assert one.run() == 75 and not started
    other.release()


def test_goodput_counts_what_was_done_since(tmp_path: Path) -> None:
    """Not the hours of an earlier start; a step that is taken again counts once."""

    def write(rows: list[dict[str, float]]) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    before = [{"step": step, "step_s": 1000.0 + step} for step in range(1, 9)]
    write(before)
    one, _ = supervisor(tmp_path, [])
    assert one._goodput().startswith("goodput 0.00: 0 s of")
    write([*before[:6], {"step": 7, "step_s": 2.0}, {"step": 8, "step_s": 3.0}, {"step": 8, "eval_s": 4.0}])
    assert "9 s of" in one._goodput()
    write(before[:6])  # cut at a resume, and then no step
    assert ": 0 s of" in one._goodput()
