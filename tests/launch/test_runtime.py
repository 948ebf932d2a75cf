"""The small parts of the machinery: schedule, ranks, run directory, the arguments of a command."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from conf.errors import RequestError
from conf.schema import BatchConfig, Config, SchedulerConfig, TrainConfig
from launch.runtime.metrics import MetricsLog
from launch.runtime.processes import Ranks, ranks_from_environment, threads_per_rank
from launch.runtime.request import split_arguments
from launch.runtime.run_dir import RunDir
from launch.runtime.schedule import lr_factor
from launch.runtime.session import optimizer_steps


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_the_schedule_warms_up_peaks_and_ends(name: str) -> None:
    scheduler = SchedulerConfig(name=name, warmup_steps=10, min_ratio=0.0 if name == "constant" else 0.1)
    factors = [lr_factor(scheduler, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1), "the first step must not be at rate 0"
    assert factors[9] == 1.0 and max(factors) == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == 1.0 if name == "constant" else 0.1 <= factors[-1] < 0.2


def test_epochs_become_steps_and_a_longer_warm_up_is_refused() -> None:
    cfg = Config(batch=BatchConfig(global_size=8, micro_size=2, accumulation=4), train=TrainConfig(epochs=1.5))
    assert optimizer_steps(cfg, samples=100) == 19
    cfg.scheduler.warmup_steps = 20
    with pytest.raises(RequestError, match="19 steps"):
        optimizer_steps(cfg, samples=100)


def test_wsd_is_stable_until_its_decay() -> None:
    scheduler = SchedulerConfig(name="wsd", warmup_steps=10, decay_steps=30)
    assert {lr_factor(scheduler, step, 100) for step in range(10, 71)} == {1.0}
    assert lr_factor(scheduler, 85, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Ranks(0, 0, 1, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Ranks(3, 1, 4, 2)),  # torchrun
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, Ranks(3, 1, 4, 2)),  # deepspeed
    ],
)
def test_ranks_of_every_launcher(variables: dict, expected: Ranks, monkeypatch) -> None:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert ranks_from_environment() == expected


def test_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(None, 1) == cores
    assert threads_per_rank(None, cores * 4) == 1
    assert threads_per_rank(3, 8) == 3


def test_the_launchers_argument_and_the_commands_own_keys_are_taken_out() -> None:
    argv = ["--local_rank=1", "+recipe=quickstart", "world_size=8", "seed=1"]
    assert split_arguments(argv, {"world_size": "1", "format": "table"}) == (
        ["+recipe=quickstart", "seed=1"],
        {"world_size": "8", "format": "table"},
    )


class TestRunDir:
    def test_overwriting_removes_a_runs_own_files_only(self, tmp_path: Path) -> None:
        for name in ("metrics.jsonl", "summary.json", "notes.txt", "model/config.json", "checkpoints_of_mine/a"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("x")
        RunDir(tmp_path).clear()
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {"notes.txt", "checkpoints_of_mine/a"}

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    def test_a_disk_that_cannot_be_written_is_told_before_anything_is_deleted(
        self, code, tmp_path, monkeypatch
    ) -> None:
        (tmp_path / "summary.json").write_text("{}")

        def fail(fd: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("launch.runtime.run_dir.os.fsync", fail)
        with pytest.raises(RequestError, match=os.strerror(code)):
            RunDir(tmp_path).create()
        assert (tmp_path / "summary.json").exists() and not list(tmp_path.rglob(".probe*"))

    def test_small_files_are_whole_or_absent(self, tmp_path: Path) -> None:
        run_dir = RunDir(tmp_path)
        run_dir.write_json("summary.json", {"a": 1})
        with pytest.raises(TypeError):
            run_dir.write_json("summary.json", {"a": object()})
        assert (tmp_path / "summary.json").read_text() == '{\n  "a": 1\n}\n'
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_metrics_that_a_full_disk_keeps_from_being_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewind on a full disk: the run goes on, and the file is that of the run as soon as it can be written."""
    said: list[str] = []
    log = MetricsLog(tmp_path / "metrics.jsonl", [], say=said.append)

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    for step in (1, 2, 3):
        log.log({"step": step})
    with monkeypatch.context() as full:

        def no_space(path: Path, *rest: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(Path, "write_bytes", no_space)
        log.cut(2, 2)
        log.log({"step": 3})
    assert len(said) == 1 and "No space left" in said[0] and steps() == [1, 2, 3]
    log.log({"step": 4})
    assert steps() == [1, 2, 3, 4]
    log.cut(1, 1)
    log.log({"step": 2})
    assert steps() == [1, 2]
