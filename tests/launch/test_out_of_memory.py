"""What is said when a device has no memory left: the keys that help, in their order, and none that is illegal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config

from conf.batch import Layout
from conf.environment import Environment
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime.out_of_memory import Phase, changes, is_out_of_memory, memory_of

GPU = Environment(device="cuda", device_count=8, fp16_supported=True)
GIB = 2**30


def phase(doing: str) -> Phase:
    found = Phase()
    found.doing = doing
    return found


def advised(cfg: Config, doing: str = "step 3", env: Environment = GPU, world: int = 2, **options: Any) -> list[str]:
    predict = options.pop("predict", lambda changed: None)
    layout = Layout.of(world, cfg.parallel)
    return [words for words, _ in changes(cfg, layout, env, phase(doing), predict, 80 * GIB, **options)]


def config(micro: int = 4, accumulation: int = 2, world: int = 2) -> Config:
    cfg = tiny_config(micro, accumulation, world)
    cfg.optimizer.fused = True  # as composing fills it in
    return cfg


def test_what_costs_least_comes_first() -> None:
    assert advised(config()) == [
        "batch.micro_size=1 batch.accumulation=8, the same global batch of 16",
        "train.activation_checkpointing=1",
        "zero=stage3",
        "zero=stage2_offload",
        "zero=stage3_offload",
        "data.seq_length=6 (other sequences: another run)",
    ]


def test_what_was_done_already_is_not_advised_again() -> None:
    cfg = config(1, 8)
    cfg.train.activation_checkpointing, cfg.train.fused_loss, cfg.zero.stage = 2, False, 3
    found = advised(cfg)
    assert found[:3] == ["train.fused_loss=true", "train.activation_checkpointing=1", "zero=stage3_offload"]
    cfg.train.activation_checkpointing, cfg.train.fused_loss = 1, True
    cfg.zero.offload_optimizer = cfg.zero.offload_param = "cpu"
    cfg.optimizer.fused = False
    assert advised(cfg, texts=False) == []


def test_the_mildest_change_that_is_predicted_to_fit() -> None:
    """micro batches of 8, of which 60 GiB go for 4: 72 of the 80 may be taken."""
    cfg = config(8, 1)

    def predict(changed: Config) -> int:
        return (changed.batch.micro_size or 0) * 15 * GIB

    found = advised(cfg, predict=predict)
    assert found[0].startswith("batch.micro_size=4 batch.accumulation=2")
    assert advised(cfg, predict=lambda changed: 100 * GIB)[0].startswith("batch.micro_size=1 batch.accumulation=8")


def test_before_the_first_step_only_what_lies_there_all_the_time_helps() -> None:
    found = advised(config(), "building the model and the engine")
    assert found == ["zero=stage3", "zero=stage2_offload", "zero=stage3_offload"]


def test_an_evaluation_has_a_size_of_its_own() -> None:
    found = advised(config(), "the evaluation after step 5")
    assert found[0] == "eval.micro_size=1" and not any("batch.micro_size" in words for words in found)


def test_illegal_changes_are_not_advised() -> None:
    cfg = config()
    cfg.parallel.pipeline = 2  # ZeRO 0 and 1 only
    assert not any(words.startswith("zero=") for words in advised(cfg, world=4))
    cfg = config()
    assert not any("offload" in words for words in advised(cfg, env=Environment())), "on a CPU it is the same memory"

    def forbids(changed: Config) -> int | None:
        if changed.train.activation_checkpointing:
            raise RequestError(Problem("train.activation_checkpointing", "1", "this family has no layers"))
        return None

    assert not any("checkpointing" in words for words in advised(cfg, predict=forbids))


def test_a_run_in_its_own_directory_is_advised_too(tmp_path: Any) -> None:
    """Its directory is that of an unfinished run by now, which no new run may have."""
    cfg = config()
    cfg.run_dir = str(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert len(advised(cfg)) == 6


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("no memory of it"), False),
    ],
)
def test_how_a_lack_of_memory_is_called(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("in a compiled layer") from cause
    except RuntimeError as outer:
        assert is_out_of_memory(outer) is expected


def test_a_gpu_says_who_holds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "mem_get_info": (2 * GIB, 80 * GIB), "memory_allocated": 60 * GIB, "memory_reserved": 70 * GIB,
        "max_memory_allocated": 66 * GIB, "get_device_name": "NVIDIA H100 80GB HBM3",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    capacity, line = memory_of(torch.device("cuda", 1))
    assert capacity == 80 * GIB
    held = "this rank held 60.0 GiB in 70.0 GiB, 66.0 GiB at most"
    assert line == f"NVIDIA H100 80GB HBM3 has 80.0 GiB, of which 2.0 GiB free; {held}"
