"""Layouts through the real launcher: ranks that die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import SMALL, TRAIN, environment, launcher
from support.tiers import THOROUGH

pytestmark = pytest.mark.slow
DEATHS = [("pipeline", "in mid-step"), ("tensor", "at start-up")]
if THOROUGH:
    DEATHS += [("pipeline", "at start-up"), ("tensor", "in mid-step")]


@pytest.mark.parametrize(("layout", "when"), DEATHS)
def test_a_dead_rank_ends_the_job(layout: str, when: str, tmp_path: Path) -> None:
    """Within 30 s, with an exit code that says so, and no process left."""
    env = environment(tmp_path / "cache")
    command = [str(part) for part in (*launcher("deepspeed", 2), TRAIN, *SMALL, f"parallel={layout}")]
    command += ["train.steps=100000", "run_dir=run"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    victim = None
    deadline = time.monotonic() + 120
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.1)
        if when == "at start-up" or (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            victim = rank_process(str(tmp_path), 1)
    assert victim is not None, "the run did not start"
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = job.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert job.returncode not in (0, 2)
    assert re.search(r"exits with return code = -?\d+", said), said[-2000:]
    time.sleep(1)
    assert rank_process(str(tmp_path), 0) is None and rank_process(str(tmp_path), 1) is None


def rank_process(folder: str, rank: int) -> int | None:
    """Process of a rank of the job that runs in `folder`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
                where = os.readlink(entry / "cwd")
            except OSError:
                continue
            if f"--local_rank={rank}" in command and where == folder:
                return int(entry.name)
    return None
