"""launch/plan.py as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import PLAN, environment, run


def plan(*arguments: str, cwd: Path | None = None, cold: bool = False) -> subprocess.CompletedProcess[str]:
    folder = cwd or Path(tempfile.mkdtemp())
    return run([sys.executable, PLAN, *arguments], folder, environment(folder / "cache"), cold=cold)


def test_json_is_one_object_and_adds_up(tmp_path: Path) -> None:
    done = plan(
        "--local_rank=0",
        "world_size=8",
        "format=json",
        "+recipe=quickstart",
        "zero=stage2",
        "batch.micro_size=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["layout"]["data"] == 8
    assert got["batch"]["global_size"] == got["batch"]["micro_size"] * got["batch"]["accumulation"] * 8
    assert got["tokens_per_step"] == got["batch"]["global_size"] * 256
    on_device = got["bytes_per_rank"]["device"]
    assert on_device["total"] == sum(size for part, size in on_device.items() if part != "total") > 0
    assert on_device["activations"] > 0
    assert got["engine"]["train_batch_size"] == got["batch"]["global_size"]
    assert got["engine"]["zero_optimization"]["stage"] == 2
    assert not list(tmp_path.iterdir()), "planning writes nothing"


def test_a_run_directory_that_is_taken_is_no_obstacle(tmp_path: Path) -> None:
    run = tmp_path / "runs/quickstart"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "summary.json").write_text("{}")
    done = plan("+recipe=quickstart", "format=json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in run.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_decoder_that_translates_has_rows_of_two_sides() -> None:
    translation = ("+recipe=describe_functions", "model=llama_4m", "eval.new_tokens=48")
    done = plan(*translation, "data.seq_length=32", "format=json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["tokens_per_step"] == got["batch"]["global_size"] * (32 + 48)
    refused = plan(*translation, "data.seq_length=100", "model.config.max_position_embeddings=128")
    assert refused.returncode == 2
    assert "data.seq_length=100" in refused.stderr and "128 positions, a row 200" in refused.stderr
    assert "data.seq_length=64" in refused.stderr


def test_table_shows_the_batch_and_every_part() -> None:
    done = plan("+recipe=quickstart", "world_size=2")
    assert done.returncode == 0, done.stderr
    assert "2 data ranks" in done.stdout and '"train_batch_size"' in done.stdout
    for part in ("parameters", "gradients", "optimizer state", "activations", "logits and loss", "total"):
        assert part in done.stdout


@pytest.mark.parametrize(
    "arguments,says",
    [
        (("+recipe=quickstart", "batch.global_size=32", "batch.micro_size=7", "batch.accumulation=1"), "batch."),
        (("+recipe=quickstart", "world_size=0"), "world_size=0"),
        (("+recipe=quickstart", "world_size=two"), "world_size=two"),
        (("+recipe=quickstart", "format=jsn"), "format=json"),
        (("+recipe=quickstart", "optimiser.lr=1"), "optimizer"),
        (("world_size=2",), "+recipe=quickstart"),
    ],
)
def test_wrong_requests_end_at_once_without_a_traceback(arguments: tuple[str, ...], says: str) -> None:
    started = time.perf_counter()
    done = plan(*arguments, cold=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error:") and says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    # The bound is 2 s; importing torch alone takes longer than that on a busy machine.
    assert time.perf_counter() - started < 4


def test_what_only_the_model_knows_is_refused_too() -> None:
    done = plan("+recipe=quickstart", "model.type=no_such_family")
    assert done.returncode == 2
    assert done.stderr.startswith("error:") and "no_such_family" in done.stderr and "Traceback" not in done.stderr
