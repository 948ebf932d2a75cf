"""Wrong requests through the real command: exit 2, one screen with key, value, rule and way out, nothing made.

What the configuration alone shows is refused before torch is imported: these commands end when they import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import NO_TORCH, PLAN, SMALL, TRAIN, environment, launcher, run

from conf.environment import detect

pytestmark = pytest.mark.slow
TINY = ("model=llama_tiny", "data.seq_length=64", "batch.global_size=8", "batch.micro_size=2")

BY_CONFIGURATION = {
    "unknown recipe": (["+recipe=quikstart"], ["+recipe=quikstart", "+recipe=quickstart"]),
    "unknown key": (["batch.micro_sze=4"], ["batch.micro_sze", "batch.micro_size"]),
    "unknown group choice": (["optimizer=adamv"], ["optimizer=adamv", "optimizer=adam"]),
    "a stage without its name": (["zero=2"], ["zero=2", "zero=stage2"]),
    "wrong type": (["train.steps=many"], ["train.steps=many", "whole number"]),
    "negative size": (["data.seq_length=-1"], ["data.seq_length=-1"]),
    "zero size": (["batch.micro_size=0"], ["batch.micro_size=0"]),
    "a triple that does not multiply": (
        ["batch.global_size=32", "batch.micro_size=5", "batch.accumulation=3"],
        ["batch.global_size=32", "5 micro × 3 accumulation", "batch.global_size=15"],
    ),
    **({} if detect().cpu_fp16_supported else {
        "fp16 where there is none": (["precision=fp16", "device=cpu"], ["precision=fp16"]),
    }),
    "bf16 with autocast": (["precision=bf16", "deepspeed.torch_autocast.enabled=true"], ["torch_autocast"]),
    "zero 2 with a pipeline": (["zero=stage2", "parallel.pipeline=2"], ["pipeline", "zero=stage1"]),
    "offload without its stage": (["zero=stage1", "zero.offload_param=cpu"], ["offload_param", "stage3"]),
    "nvme without a path": (["zero=stage3_nvme"], ["nvme_path"]),
    "a removed optimizer": (["optimizer.name=onebitadam"], ["onebitadam", "removed"]),
    "an unknown optimizer": (["optimizer.name=adamm"], ["optimizer.name=adamm", "adam"]),
    "a removed engine key": (["deepspeed.elasticity.enabled=true"], ["elasticity", "removed"]),
    "a typo of an engine key": (["deepspeed.zero_optimisation.stage=1"], ["zero_optimisation", "zero_optimization"]),
    "a typo inside an engine block": (
        ["deepspeed.zero_optimization.reduce_buckt_size=1000"],
        ["reduce_buckt_size", "reduce_bucket_size"],
    ),
    "warm-up longer than training": (["train.steps=10", "scheduler.warmup_steps=20"], ["scheduler.warmup_steps=20"]),
    "sequences longer than the model": (["data.seq_length=4096"], ["data.seq_length=4096", "1024"]),
    "a vocabulary larger than the embedding": (["data.vocab_size=9000"], ["data.vocab_size=9000", "4096"]),
    "both steps and epochs": (["train.epochs=1", "train.steps=50"], ["train.steps", "train.epochs"]),
    "a data path that does not exist": (["data=text", "data.path=nowhere/*.txt"], ["data.path=nowhere"]),
    "a model folder that does not exist": (["model=pretrained", "model.path=./nowhere"], ["model.path=./nowhere"]),
    "a mandatory key left out": (["model=pretrained"], ["model.path"]),
    "a package that is not installed": (["model=pretrained", "model.path=package:nosuch"], ["package:nosuch"]),
    "a multirun": (["--multirun"], ["multirun"]),
}  # fmt: skip


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch ends a command."""
    return environment(tmp_path / "cache", **{NO_TORCH: "1"})


def refused(done: subprocess.CompletedProcess[str], cwd: Path, words: list[str]) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error:"), done.stderr
    assert "Traceback" not in done.stderr and "torch was imported" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24, "more than one screen"
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr}"
    assert not (cwd / "runs").exists(), "a refused request made a run directory"


@pytest.mark.parametrize("case", BY_CONFIGURATION)
@pytest.mark.parametrize("command", [TRAIN, PLAN], ids=["train", "plan"])
def test_refused_by_the_configuration_alone(case: str, command: Path, tmp_path: Path, no_torch) -> None:
    overrides, words = BY_CONFIGURATION[case]
    recipe = [] if any("recipe=" in o for o in overrides) else ["+recipe=quickstart"]
    refused(run([sys.executable, command, *recipe, *overrides], tmp_path, no_torch), tmp_path, words)


@pytest.mark.parametrize("command", [TRAIN, PLAN], ids=["train", "plan"])
def test_all_problems_at_once(command: Path, tmp_path: Path) -> None:
    """With an interpreter of its own, as a user starts it, and a `torch` that raises."""
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    env = environment(tmp_path / "cache", PYTHONPATH=str(poison))
    wrong = ["batch.micro_sze=3", "train.steps=abc", "zero=2", "optimizer.lr=-1", "deepspeed.gradient_cliping=1"]
    done = run([sys.executable, command, "+recipe=quickstart", *wrong], tmp_path, env, cold=True)
    refused(done, tmp_path, ["5 problems", "micro_sze", "train.steps", "zero=2", "optimizer.lr", "gradient_cliping"])


def test_a_world_that_does_not_divide(tmp_path: Path, no_torch) -> None:
    done = run([sys.executable, PLAN, "+recipe=quickstart", "world_size=3"], tmp_path, no_torch)
    refused(done, tmp_path, ["batch.global_size", "3"])
    done = run([sys.executable, TRAIN, "+recipe=quickstart"], tmp_path, {**no_torch, "WORLD_SIZE": "3", "RANK": "0"})
    refused(done, tmp_path, ["batch.global_size", "3"])


def test_the_other_ranks_leave_the_word_to_the_first(tmp_path: Path, no_torch) -> None:
    """One message for two ranks; a rank that alone is refused says so after a while."""
    wrong = ["+recipe=quickstart", "zero=2"]
    done = run([*launcher("torchrun", 2), TRAIN, *wrong], tmp_path, environment(tmp_path / "cache"))
    assert done.returncode != 0 and done.stderr.count("zero=stage2") == 1
    alone = {**no_torch, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = run([sys.executable, TRAIN, "--local_rank=1", *wrong], tmp_path, alone)
    assert done.returncode == 2 and done.stderr.startswith("rank 1: error:")


DATA = {
    "an empty file": ("rows.jsonl", b"", [], ["rows.jsonl", "no bytes"]),
    "no such column": ("rows.jsonl", b'{"txt": "a"}\n' * 9, [], ["data.text", "txt"]),
    "a broken line": ("rows.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": oops}\n', [], ["rows.jsonl:3"]),
    "a value that is no text": ("rows.jsonl", b'{"text": "a"}\n{"text": 7}\n', [], ["rows.jsonl:2"]),
    "invalid UTF-8": ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n', [], ["rows.jsonl:2", "UTF-8"]),
    "half a completion": ("rows.jsonl", b'{"a": "x", "b": "y"}\n', ["data.prompt=a"], ["data.completion"]),
    "fewer rows than a batch": ("rows.jsonl", b'{"text": "a b c"}\n' * 4, [], ["batch.global_size=8"]),
    "a csv row too short": ("rows.csv", b"text,label\na,1\nb\n", [], ["rows.csv:3"]),
    "no parquet at all": ("rows.parquet", b"not parquet", [], ["rows.parquet"]),
    "text that is no UTF-8": ("rows.text", b"good\n\xff\xfe bad\n" * 50, [], ["rows.text"]),
}


@pytest.mark.parametrize("case", DATA)
def test_refused_by_the_data(case: str, tmp_path: Path) -> None:
    name, content, overrides, words = DATA[case]
    (tmp_path / name).write_bytes(content)
    kind = Path(name).suffix.removeprefix(".")
    rows = [f"data={kind}", f"data.path={name}", *overrides]
    done = run([sys.executable, TRAIN, "+recipe=quickstart", *TINY, *rows], tmp_path, environment(tmp_path / "cache"))
    refused(done, tmp_path, words)


def test_a_model_folder_without_weights(tmp_path: Path, no_torch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run([sys.executable, TRAIN, "+recipe=quickstart", "model=pretrained", "model.path=./m"], tmp_path, no_torch)
    refused(done, tmp_path, ["model.path=./m", "safetensors"])


@pytest.mark.parametrize("overrides, word", [
    (["model=pretrained", "model.path=nobody/no-such-model"], "model.path=nobody/no-such-model"),
    (["data=hub", "data.name=nobody/no-such-rows"], "nobody/no-such-rows"),
])  # fmt: skip
def test_a_hub_name_without_a_network_says_what_to_do(overrides: list[str], word: str, tmp_path: Path) -> None:
    done = run(
        [sys.executable, TRAIN, "+recipe=quickstart", *overrides],
        tmp_path,
        environment(tmp_path / "cache"),
    )
    refused(done, tmp_path, [word, "local"])


def test_a_finished_run_is_not_overwritten(tmp_path: Path, no_torch) -> None:
    finished = tmp_path / "mine"
    finished.mkdir()
    (finished / "summary.json").write_text("{}")
    done = run([sys.executable, TRAIN, "+recipe=quickstart", "run_dir=mine"], tmp_path, no_torch)
    refused(done, tmp_path, ["run_dir=mine", "overwrite=true"])
    assert [path.name for path in finished.iterdir()] == ["summary.json"]


def test_a_folder_that_is_no_run_is_not_written_into(tmp_path: Path, no_torch) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    for more in ([], ["overwrite=true"]):
        done = run([sys.executable, TRAIN, "+recipe=quickstart", "run_dir=thesis", *more], tmp_path, no_torch)
        refused(done, tmp_path, ["run_dir=thesis"])
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    for place in ("/proc/run", "/sys/run"):
        done = run([sys.executable, TRAIN, *SMALL, f"run_dir={place}"], tmp_path, environment(tmp_path / "cache"))
        refused(done, tmp_path, [f"run_dir={place}"])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("options", ["size=256k", "ro"])
def test_a_full_or_read_only_disk(options: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        done = run([sys.executable, TRAIN, *SMALL, f"run_dir={disk}/run"], tmp_path, environment(tmp_path / "cache"))
        refused(done, tmp_path, [f"run_dir={disk}/run"])
    finally:
        subprocess.run(["umount", disk], check=True)
