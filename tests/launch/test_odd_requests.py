"""Odd input that once trained in silence, hung, or ended in a traceback."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import EXPORT, PLAN, SMALL, TRAIN, environment, run
from filelock import FileLock
from ranks import run_ranks
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import recipes.models.linear  # noqa: F401 - makes the linear model known to transformers
from conf.errors import RequestError
from conf.schema import Config
from launch.runtime.processes import free_port
from launch.runtime.run_dir import RunDir
from recipes.models.configuration import check_buildable, scratch_config


@pytest.mark.parametrize(
    "family, config, key, nearest",
    [
        ("llama", {"hiden_size": 64}, "model.config.hiden_size", "model.config.hidden_size"),
        ("gpt2", {"n_embed": 64}, "model.config.n_embed", "model.config.n_embd"),
        ("lama", {}, "model.type", "model.type=llama"),
        ("llama", {"initializer_range": "abc"}, "model.config", ""),
        ("llama", {"rms_norm_eps": "tiny"}, "model.config", ""),
    ],
)
def test_a_model_that_does_not_exist_is_refused(family: str, config: dict, key: str, nearest: str) -> None:
    with pytest.raises(RequestError) as refused:
        scratch_config(family, config)
    (problem,) = refused.value.problems
    assert problem.key == key and nearest in problem.nearest


def test_other_names_of_an_attribute_are_known() -> None:
    assert scratch_config("gpt2", {"hidden_size": 48, "num_hidden_layers": 2}).n_embd == 48
    assert scratch_config("llama", {"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("family, config", [("llama", {"hidden_act": "foo"}), ("t5", {})])
def test_a_model_that_cannot_be_built_is_refused(family: str, config: dict) -> None:
    from transformers import AutoModelForCausalLM

    (problem,) = check_buildable(AutoModelForCausalLM, scratch_config(family, config), Config())
    assert problem.key == "model.config"


@pytest.mark.parametrize("key, value", [("activation_checkpointing", 1), ("compile", True)])
def test_layers_that_a_family_does_not_have(key: str, value: Any) -> None:
    """Neither a traceback of transformers nor an option without effect."""
    cfg = Config()
    setattr(cfg.train, key, value)
    classifier = (
        AutoModelForSequenceClassification,
        scratch_config("bert", {"hidden_size": 16, "num_attention_heads": 2}),
    )
    images = AutoModelForImageClassification, scratch_config("convnext", {"depths": [1, 1, 1, 1]})
    line = AutoModelForSequenceClassification, scratch_config("linear_regression", {"num_features": 1})
    assert check_buildable(*classifier, cfg) == []
    for other in (images, line):
        (problem,) = check_buildable(*other, cfg)
        assert problem.key == f"train.{key}"


@pytest.mark.parametrize(
    "odd", ["run_dir='~nosuchuser/x'", f"run_dir={'a' * 300}", "world_size=²", "world_size=0"], ids=lambda odd: odd[:20]
)
def test_odd_values_are_refused_without_a_traceback(odd: str, tmp_path: Path) -> None:
    done = run([sys.executable, PLAN, "+recipe=quickstart", odd], tmp_path, environment(tmp_path / "cache"))
    assert done.returncode == 2 and done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_a_port_that_another_run_has_is_refused(tmp_path: Path) -> None:
    """Every launcher begins with the same one."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = environment(tmp_path / "cache", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT=port)
        done = run([sys.executable, TRAIN, *SMALL], tmp_path, env)
    assert done.returncode == 2 and "--master_port" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_start_from_a_deleted_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["bash", "-c", f"rmdir {gone}; exec {sys.executable} {PLAN} +recipe=quickstart"]
    done = run(command, gone, environment(tmp_path / "cache"))
    assert done.returncode == 2 and "does not exist any more" in done.stderr


def test_a_run_directory_at_work_is_left_alone(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path), RunDir(tmp_path)
    first.create()
    first.claim(ranks=1)
    with pytest.raises(RequestError, match="another run is at work"):
        second.claim(ranks=1)
    first.leave()
    second.claim(ranks=1)


def test_logs_of_ranks_that_are_no_more_are_removed(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    for rank in range(4):
        (run_dir.logs / f"rank_{rank}.log").write_text("old")
    run_dir.claim(ranks=2)
    assert sorted(path.name for path in run_dir.logs.iterdir()) == ["rank_0.log", "rank_1.log"]


@pytest.mark.slow
def test_a_model_that_has_become_nan_is_not_exported(tmp_path: Path) -> None:
    """The last update is only seen by the evaluation behind it."""
    wild = ["optimizer.lr=1e38", "optimizer.gradient_clipping=0", "train.steps=1", "scheduler.warmup_steps=0"]
    done = run([sys.executable, TRAIN, *SMALL, *wild], tmp_path, environment(tmp_path / "cache"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "held-out loss is" in done.stderr and "no model is exported" in done.stderr
    assert not (tmp_path / "runs/quickstart/model").exists()
    assert "NaN" not in (tmp_path / "runs/quickstart/metrics.jsonl").read_text()


@pytest.mark.slow
def test_deepspeed_0_19_8_compiles_nothing_that_a_run_does_not_use(tmp_path: Path) -> None:
    """Its all-reduce over shared memory would take a minute and a compiler, and leave memory behind when killed."""
    extensions, port = tmp_path / "extensions", str(free_port())
    env = environment(tmp_path / "cache", TORCH_EXTENSIONS_DIR=str(extensions), CXX="/bin/false", MASTER_PORT=port)
    done = run([sys.executable, TRAIN, *SMALL], tmp_path, env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not extensions.exists() and "compiles a kernel" not in done.stdout
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


def builds(rank: int, world: int) -> None:
    """Have the kernel of the offloaded step."""
    from launch.runtime import kernels

    kernels.build("CPUAdamBuilder")


@pytest.mark.slow
def test_a_lock_left_by_an_interrupted_build_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch (2.13) waits for its own lock file for ever; a run takes it away, under a lock that dies with its owner."""
    run_ranks(1, builds)
    compiled, extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam", tmp_path / "extensions"
    shutil.copytree(compiled, extensions / "cpu_adam")
    (extensions / "cpu_adam/lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    run_ranks(1, builds, timeout_s=120)
    assert FileLock(extensions / "deepspeed_recipes.lock").acquire(timeout=0)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"WORLD_SIZE": "abc"}, "error: WORLD_SIZE=abc: a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "error: RANK=5: a whole number below 2"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            "error: LOCAL_WORLD_SIZE=4: a whole number",
        ),
    ],
)
def test_ranks_that_no_launcher_starts(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    """They would wait for others that never come."""
    done = run([sys.executable, TRAIN, "+recipe=line"], tmp_path, environment(tmp_path / "cache", **variables))
    assert done.returncode == 2 and done.stderr.startswith(said) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_without_columns(tmp_path: Path) -> None:
    words = [sys.executable, TRAIN, "+recipe=line", "train.steps=2", "run_dir=run"]
    done = run(words, tmp_path, environment(tmp_path / "cache", COLUMNS="0"))
    assert done.returncode == 0 and "held-out loss" in done.stdout


def test_a_model_that_this_machine_cannot_hold(tmp_path: Path) -> None:
    """The system would kill the process without a word."""
    words = ["+recipe=quickstart", "model.type=llama", "data.max_files=30", "train.steps=4", "scheduler.warmup_steps=1"]
    huge = "model.config={hidden_size: 65536, num_hidden_layers: 400, num_attention_heads: 64}"
    done = run([sys.executable, TRAIN, *words, huge], tmp_path, environment(tmp_path / "cache"))
    assert done.returncode == 2 and "are predicted to be needed, this machine has" in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_folders_with_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "lr=3" / "model").mkdir(parents=True)
    for script, words, said in [
        (EXPORT, ["out=x"], "error: MODEL=lr=3/model: holds no exported model"),
        (EXPORT, ["out=x", "shard_mb=²"], "error: shard_mb=²: a positive number"),
        (EXPORT.with_name("checkpoints.py"), [], "error: RUN_DIR=lr=3: has no checkpoints"),
    ]:
        done = run([sys.executable, script, "lr=3", *words], tmp_path, environment(tmp_path / "cache"))
        assert done.returncode == 2 and done.stderr.startswith(said), done.stderr
