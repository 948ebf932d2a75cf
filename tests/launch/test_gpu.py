"""What only a GPU would show, as far as a made-up one can show it: waits for the device, copies, groups, kernels."""

from __future__ import annotations

import datetime
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import TinyCausalLM, tiny_config

from conf.batch import Layout


def engine_for(world: int, stage: int, accumulation: int = 1, precision: str = "fp32", tensor: int = 1) -> Any:
    """(engine, recipe, cfg, layout) of a tiny run, of eight rows a step."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.staged import make_engine

    cfg = tiny_config(8 * tensor // world // accumulation, accumulation, world // tensor)
    cfg.parallel.tensor = tensor
    cfg.zero.stage, cfg.zero.param_persistence_threshold, cfg.precision.name = stage, 0, precision
    if stage == 0:
        cfg.precision.accumulation_dtype = precision
    layout, recipe = Layout.of(world, cfg.parallel), TinyCausalLM(cfg)
    recipe.prepare()
    return make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), 5), recipe, cfg, layout


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would make the host wait for a GPU: one number that is read, places of what is true."""

    KINDS = ("_local_scalar_dense", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in self.KINDS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def waits(rank: int, world: int, stage: int) -> list[dict[str, int]]:
    """Of a fourth step (ZeRO-3 notes the order of things in the first ones) with one and with four micro-batches."""
    from launch.runtime.loop import training_batches

    found = []
    for accumulation in (1, 4):
        engine, recipe, cfg, layout = engine_for(world, stage, accumulation)
        for step in range(3):
            engine.train_step(training_batches(step, rank, recipe, cfg, layout))
        batches = training_batches(3, rank, recipe, cfg, layout)
        with Waits() as seen:
            engine.train_step(batches)
            engine.peak_memory_bytes()
        found.append(dict(seen.counts))
        engine.ds.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_host_does_not_wait_for_the_device_in_each_micro_batch(stage: int) -> None:
    """But for one look of transformers 5.23 at packed documents (masking_utils.find_packed_sequence_indices)."""
    one, four = run_ranks(1, waits, stage)[0]
    assert "nonzero" not in one and "nonzero" not in four
    assert four["_local_scalar_dense"] - one["_local_scalar_dense"] == 3, (one, four)
    # The engine's own: overflow, norm, clipping; at stage 0 one for each parameter.
    assert one["_local_scalar_dense"] <= (40 if stage == 0 else 12), one


def norms_in_fp16(rank: int, world: int) -> list[tuple[list[float | None], list[bool], list[float]]]:
    """(norms, which steps were taken, losses) of five steps in fp32, and in fp16 at each stage."""
    from deepspeed.accelerator import get_accelerator

    from launch.runtime.loop import training_batches

    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on this CPU, and right
    found = []
    for stage, precision in ((1, "fp32"), (0, "fp16"), (1, "fp16"), (2, "fp16"), (3, "fp16")):
        engine, recipe, cfg, layout = engine_for(world, stage, 2, precision)
        steps = [engine.train_step(training_batches(s, rank, recipe, cfg, layout)) for s in range(5)]
        found.append(([s.grad_norm for s in steps], [s.applied for s in steps], [s.loss for s in steps]))
        engine.ds.destroy()
    return found


@pytest.mark.slow
def test_fp16_reports_the_norm_of_the_gradient_at_every_stage() -> None:
    """deepspeed 0.19.8 does not scale the loss at stage 0, unscales the gradient, and measures it in between.

    fp16 keeps 11 bits: the first norm is that of the same weights, later ones those of a model that was trained so.
    """
    fp32, *others = run_ranks(2, norms_in_fp16)[0]
    for norms, applied, losses in others:
        assert applied == [True] * 5
        np.testing.assert_allclose(norms[0], fp32[0][0], rtol=2**-10)
        np.testing.assert_allclose(norms, fp32[0], rtol=2e-2)
        np.testing.assert_allclose(losses, fp32[2], rtol=2**-8)


def overflowing(rank: int, world: int) -> list[tuple[list[bool], list[float | None], list[float], int]]:
    """(which steps were taken, norms, rates, steps of the schedule) where the first loss scale is far too large."""
    from deepspeed.accelerator import get_accelerator

    from launch.runtime.loop import training_batches

    type(get_accelerator()).is_fp16_supported = lambda self: True
    found = []
    for stage in range(4):
        engine, recipe, cfg, layout = engine_for(world, stage, 1, "fp16")
        scaler = getattr(engine.ds.optimizer, "loss_scaler", None) or engine.ds.optimizer.loss_scale_config
        scaler.cur_scale, scaler.cur_hysteresis = 2.0**30, 1
        steps = [engine.train_step(training_batches(s, rank, recipe, cfg, layout)) for s in range(20)]
        rates = [step.lr for step in steps]
        found.append(
            ([s.applied for s in steps], [s.grad_norm for s in steps], rates, engine.ds.lr_scheduler.last_epoch)
        )
        engine.ds.destroy()
    return found


@pytest.mark.slow
def test_steps_that_loss_scaling_skips_have_no_norm_and_do_not_move_the_schedule() -> None:
    for applied, norms, rates, position in run_ranks(1, overflowing)[0]:
        assert not applied[0] and applied[-1]
        assert [norm is not None for norm in norms] == applied
        assert position == sum(applied) and len(set(rates)) == 1


def norms_of_shares(rank: int, world: int) -> list[float]:
    """Of a first step in fp32, and in bf16 at stages 1 and 0."""
    from launch.runtime.loop import training_batches

    found = []
    for stage, precision in ((1, "fp32"), (1, "bf16"), (0, "bf16")):
        engine, recipe, cfg, layout = engine_for(world, stage, 1, precision, tensor=2)
        batches = training_batches(0, layout.place(rank).data, recipe, cfg, layout)
        found.append(engine.train_step(batches).grad_norm)
        engine.ds.destroy()
    return found


@pytest.mark.slow
def test_deepspeed_0_19_8_measures_a_share_of_the_gradient_at_stage_0_in_16_bits() -> None:
    """Which is why conf/rules_parallel.py (norm_of_shares) refuses it: clipping would be another one."""
    fp32, stage1, stage0 = run_ranks(2, norms_of_shares)[0]
    assert stage1 == pytest.approx(fp32, rel=2**-8)
    assert stage0 < 0.9 * fp32


def test_batches_are_copied_out_of_pinned_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.runtime.engine import Engine

    calls: list[Any] = []

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("pinned")
        return tensor

    def moved(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append((str(device), non_blocking))
        return tensor

    engine = object.__new__(Engine)
    engine.device = torch.device("cuda", 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(torch.Tensor, "to", moved)
        engine._on_device(np.zeros(3))
    assert calls == ["pinned", ("cuda:1", True)]


def test_which_places_are_supervised_is_told_by_the_host() -> None:
    from tiny import plain_model

    from recipes.base import PICKED
    from recipes.models.loss import IGNORE

    recipe = TinyCausalLM(tiny_config(4, 1, 1))
    recipe.prepare()
    model = plain_model(recipe)
    recipe.adopt(model)
    batch = {k: torch.from_numpy(v) for k, v in recipe.collate([recipe.train.row(n) for n in range(4)], 4).items()}
    asked = recipe.loss(model, batch)
    told = recipe.loss(model, {**batch, PICKED: torch.from_numpy(np.flatnonzero(batch["labels"].numpy() != IGNORE))})
    assert torch.equal(asked, told)
    with Waits() as seen:
        recipe.loss(model, {**batch, PICKED: torch.zeros(1, dtype=torch.long)})
    assert not seen.counts["nonzero"]


def test_a_stage_measures_its_passes_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the device in between: once, when the step is over."""
    from deepspeed.runtime.pipe import schedule

    from launch.runtime.pipeline import Clock

    clock, waited = iter(range(0, 8000, 1000)), []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

        def synchronize(self) -> None:
            waited.append(self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Clock(torch.device("cuda", 0))
    for kind in (schedule.ForwardPass, schedule.RecvActivation, schedule.BackwardPass, schedule.ReduceGrads):
        watch.timed(kind, lambda engine: None)(None)
    assert watch.busy_and_span() == (2.0, 5.0) and waited == [5000]


def test_fp32_is_fp32_and_the_device_is_this_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.runtime import processes

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    before = torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    try:
        device = processes.join(processes.Ranks(6, 2, 8, 4), "cuda", 1)
        assert (str(device), chosen) == ("cuda:2", [2])
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_num_threads(before[1])


def timeouts(rank: int, world: int, stall_s: float) -> list[datetime.timedelta]:
    from torch.distributed import distributed_c10d as c10d

    from launch.runtime import processes

    torch.distributed.new_group([0, 1])
    processes.wait_for_others(stall_s)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in c10d._world.pg_map]


@pytest.mark.slow
def test_collective_calls_outwait_the_watchdog() -> None:
    for stall_s in (3600.0, 0.0):
        for found in run_ranks(2, timeouts, stall_s):
            assert len(found) >= 2 and all(one.total_seconds() > max(stall_s, 3600.0) for one in found), found


@pytest.mark.parametrize(
    ("broken", "world", "backend", "closes"),
    [(True, 2, "nccl", False), (False, 2, "nccl", True), (True, 1, "nccl", True), (True, 2, "gloo", True)],
)
def test_a_rank_that_gives_up_does_not_wait_for_the_others(
    broken: bool, world: int, backend: str, closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed import comm

    from launch.runtime import processes

    closed: list[bool] = []
    monkeypatch.setattr(processes, "_left_open", False)
    monkeypatch.setattr(comm, "is_initialized", lambda: True)
    monkeypatch.setattr(comm, "destroy_process_group", lambda: closed.append(True))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    processes.leave(broken)
    assert bool(closed) is closes and processes.must_exit() is not closes


def test_who_waits_for_nccl_waits_for_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The call itself returned long ago: the main thread is in whatever reads a value from the device."""
    from launch.runtime.watchdog import Watchdog, device_is_busy, report

    assert not device_is_busy()
    asked: list[int] = []

    def stream(device: int) -> Any:
        asked.append(device)
        return SimpleNamespace(query=lambda: False)

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", stream)
    waiting = Watchdog(tmp_path, 0, 2, 5, print)._note()
    assert waiting.waits_in == "its GPU" and asked == [3]
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(query=lambda: True))
    stuck = Watchdog(tmp_path, 1, 2, 5, print)._note()
    text = report([waiting, stuck], 2, 5)
    assert "rank 1 does not go on" in text and "rank 0: waits in its GPU" in text


@pytest.mark.parametrize(
    ("text", "noticed"),
    [
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            True,
        ),
        ("NCCL error: remote process exited or there was a network error", True),
        ("NCCL communicator was aborted on rank 1", True),
        ("ncclInternalError: Internal check failed.", False),
    ],
)
def test_a_rank_that_noticed_another_ones_end_says_nothing(text: str, noticed: bool) -> None:
    from launch.train import _caused_by_another_rank

    assert _caused_by_another_rank(RuntimeError(text)) is noticed


@pytest.mark.parametrize(
    ("optimizer", "offload", "quantised", "device", "wanted"),
    [
        ("lion", "none", False, "cuda", ["FusedLionBuilder"]),
        ("lion", "cpu", False, "cuda", ["CPULionBuilder"]),
        ("lamb", "none", False, "cuda", ["FusedLambBuilder"]),
        ("adamw", "none", True, "cuda", ["QuantizerBuilder"]),
        ("adamw", "cpu", False, "cuda", ["CPUAdamBuilder"]),
        ("adamw", "none", False, "cuda", []),
        ("adamw", "cpu", False, "cpu", ["CPUAdamBuilder"]),
    ],
)
def test_kernels_are_compiled_by_one_rank_before_anything_needs_them(
    optimizer: str, offload: str, quantised: bool, device: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.runtime import kernels

    built: list[str] = []
    monkeypatch.setattr(kernels, "build", built.append)
    cfg = tiny_config(1, 1, 1)
    cfg.optimizer.name, cfg.zero.offload_optimizer, cfg.zero.quantized_weights = optimizer, offload, quantised
    kernels.build_for(cfg, device)
    assert built == wanted


def test_the_engine_has_a_builder_of_each_kernel_on_gpus() -> None:
    from deepspeed.ops import op_builder

    from launch.runtime.kernels import ON_GPUS

    assert all(hasattr(op_builder, name) for name in (*ON_GPUS.values(), "QuantizerBuilder"))
