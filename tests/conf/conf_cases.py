"""What the tests of the configuration share: machines, and ways to compose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conf.compose import _compose, compose
from conf.environment import Environment
from conf.errors import Problem, RequestError
from conf.overrides import read_overrides
from conf.schema import Config

CPU = Environment(device="cpu")
CPU_FP16 = Environment(device="cpu", fp16_supported=True, cpu_fp16_supported=True)
CPU_NO_CACHE = Environment(device="cpu", kernel_folder=False)
BARE = Environment(device="cpu", compiler=False, ninja=False)
NO_WANDB = Environment(device="cpu", trackers=frozenset({"tensorboard"}))
CPU_AIO = Environment(device="cpu", libaio=True)
GPU = Environment(device="cuda", device_count=8, fp16_supported=True, bf16_supported=True, libaio=True)
GPU_BARE = replace(GPU, cuda_compiler=False, python_headers=False)


def quick(*overrides: str) -> list[str]:
    """A quickstart request for a folder of its own (the tests stand in an empty directory)."""
    return ["+recipe=quickstart", *overrides]


def problems_of(overrides: list[str], world: int = 2, env: Environment = CPU) -> list[Problem]:
    """The problems of a request; empty when it is legal."""
    try:
        compose(overrides, world, env)
    except RequestError as error:
        return error.problems
    return []


def unchecked(overrides: list[str]) -> Config:
    """The configuration before any rule has seen it."""
    read = read_overrides(overrides)
    assert not read.problems, read.problems
    config, failures = _compose(read)
    assert config is not None, failures
    return config


def write(path: str, text: str = "x\n") -> Path:
    """A small file, with its folders."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
