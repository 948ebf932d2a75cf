"""A state that one layout saved, in another: parameters and optimizer bit for bit, and the same next steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import Case, configuration
from ranks import run_ranks
from support.tiers import THOROUGH
from tiny import TinyCausalLM

from conf.batch import Layout
from conf.rules_run import RESUMED
from conf.schema import Config, OptimizerConfig
from launch.runtime import tensor_file
from launch.runtime.checkpoint import read
from launch.runtime.state import SavedState
from recipes.models.tensor_parallel import Cut

pytestmark = pytest.mark.slow
BEFORE, AFTER = (10, 10) if THOROUGH else (5, 5)
RELATIVE = 1e-5
"""Of the losses behind a change of layout: other orders of sums."""
FROM = (
    Case("llama", 0), Case("llama", 1, data=2), Case("llama", 2, data=4), Case("llama", 3, data=2),
    Case("llama", 1, tensor=2), Case("llama", 1, data=2, tensor=2, accumulation=2), Case("llama", 3, data=2, tensor=2),
    Case("llama", 1, pipeline=2, accumulation=4), Case("llama", 1, data=2, pipeline=2, tensor=2, accumulation=4),
)  # fmt: skip
TO = (
    Case("llama", 0, data=2), Case("llama", 1), Case("llama", 2, data=2, accumulation=2), Case("llama", 3, data=4),
    Case("llama", 1, data=2, tensor=2), Case("llama", 3, tensor=2), Case("llama", 1, pipeline=2, accumulation=4),
    Case("llama", 1, data=2, pipeline=2, tensor=2, accumulation=4),
)  # fmt: skip
SAME = (
    Case("llama", 0, data=2), Case("llama", 1, data=2), Case("llama", 2, data=2), Case("llama", 3, data=2),
    Case("llama", 1, tensor=2), Case("llama", 1, pipeline=2, accumulation=4), Case("smollm2", 3, data=2),
    Case("smollm2", 0, pipeline=2, accumulation=4), Case("llama", 1, sequence=2), Case("gpt2", 1, tensor=2),
    Case("mixtral", 1, data=2), Case("llama", 1, data=2, precision="bf16"), Case("llama", 3, data=2, precision="bf16"),
    Case("llama", 0, data=2, precision="bf16", accumulation_dtype="bf16"),
    Case("llama", 1, pipeline=2, accumulation=4, schedule="dualpipev"),
)  # fmt: skip


ADAM: dict[str, Any] = {"name": "adamw", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8}
OTHERS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"name": "adam", "lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "fused": False}, (1, 3)),
    ({"name": "sgd", "lr": 0.1, "momentum": 0.9}, (0, 1, 2, 3)),
    ({"name": "adagrad", "lr": 1e-2, "eps": 1e-10}, (0,)),
)
"""The other optimizers that can be resumed, and the ZeRO stages at which the engine has them; Lion: see OFFLOADED."""
LION: dict[str, Any] = {"name": "lion", "lr": 1e-3, "betas": [0.9, 0.99]}
HAS_LION = any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/cpu_lion.so"))
OFFLOADED = (
    ADAM,
    pytest.param(
        LION,
        marks=pytest.mark.skipif(
            not (HAS_LION or THOROUGH), reason="its kernel was never built here, which takes a minute"
        ),
    ),
)
"""The optimizers with a kernel for CPUs."""


def configured(case: Case, optimizer: dict[str, Any] = ADAM) -> tuple[Config, Layout]:
    """By default Adam: its state is two tensors and a step; and dropout where a family has it."""
    cfg, layout = configuration(case)
    cfg.optimizer = OptimizerConfig(weight_decay=0.1, **optimizer)
    cfg.scheduler.name, cfg.scheduler.warmup_steps = "cosine", 3
    if case.model == "gpt2":
        cfg.model.config |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return cfg, layout


@dataclass(frozen=True)
class Job:
    """Steps `first` to the last of a case; from the checkpoint of step `first` unless that is 0, saved if it is."""

    case: Case
    folder: Path
    first: int = 0
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAM)
    frozen: tuple[str, ...] = ()
    """What the names of the parameters begin with that are not trained."""
    offload: str = "none"
    slow_s: float = 0.0
    """Seconds that the disk takes for each piece of a file."""


@contextlib.contextmanager
def frozen(prefixes: tuple[str, ...]) -> Iterator[None]:
    """Engines train no parameter whose name begins so."""
    from launch.runtime import engine

    build = engine.build

    def freezing(*args: Any) -> Any:
        stages = build(*args)
        for stage in stages:
            for name, parameter in stage.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not name.startswith(prefixes))
        return stages

    engine.build = freezing if prefixes else build
    try:
        yield
    finally:
        engine.build = build


def slow_disk(seconds: float) -> Any:
    """The pieces of a file, each after a while."""
    parts = tensor_file._parts

    def slowly(head: bytes, values: Any) -> Any:
        for part in parts(head, values):
            time.sleep(seconds)
            yield part

    return slowly


def work(rank: int, world: int, jobs: list[Job]) -> list[dict[str, Any]]:
    """Of each job: losses, rates, samples, this rank's weights and state as restored or saved, and after the last step.

    A checkpoint is written while the steps behind it are taken.
    """
    from launch.runtime.checkpoint import newest
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import Progress, sample_indices, training_batches
    from launch.runtime.saving import Saving
    from launch.runtime.session import restored
    from launch.runtime.staged import make_engine

    results, parts, started = [], tensor_file._parts, 0.0
    for job in jobs:
        cfg, layout = configured(job.case, job.optimizer)
        cfg.zero.offload_optimizer = job.offload
        recipe = TinyCausalLM(cfg)
        recipe.prepare()
        config = ds_config(cfg, layout, "cpu")
        with frozen(job.frozen):
            engine = make_engine(recipe, cfg, layout, config, torch.device("cpu"), BEFORE + AFTER)
        saving = Saving(job.folder / "checkpoints", 2, 0, asdict(cfg), "rows")
        result: dict[str, Any] = {"losses": [], "rates": [], "samples": []}
        if job.first:
            found = newest(job.folder / "checkpoints")
            assert found is not None and found.step == job.first
            assert restored(engine, found, layout).step == job.first
            result["at"] = weights(engine)
        data = layout.place(rank).data
        for step in range(job.first, BEFORE + AFTER):
            done = engine.train_step(training_batches(step, data, recipe, cfg, layout))
            result["losses"].append(done.loss)
            result["rates"].append(done.lr)
            result["samples"].append([sample for part in sample_indices(step, data, cfg, layout) for sample in part])
            if not job.first and step + 1 == BEFORE:
                result["at"] = weights(engine)
                tensor_file._parts = slow_disk(job.slow_s) if job.slow_s else parts
                saving.begin(engine, BEFORE, asdict(Progress(step=BEFORE)))
                started = time.monotonic()
        result["steps_s"] = time.monotonic() - started
        assert saving.finish()
        result["saved_s"] = time.monotonic() - started
        tensor_file._parts = parts
        result["last"] = weights(engine)
        engine.ds.destroy()
        results.append(result)
    return results


def weights(engine: Any) -> dict[str, np.ndarray]:
    """This rank's stretches of the fp32 weights and of Adam's state, by their names in the checkpoint."""
    from launch.runtime.state import RNG, own_tensors

    return {name: value.clone().numpy() for name, value in own_tensors(engine).items() if not name.startswith(RNG)}


def whole(ranks: list[dict[str, Any]], moment: str) -> dict[tuple[str, str], np.ndarray]:
    """(name, kind) → all elements, in the order of tensor rank and start: comparable between equal tensor degrees."""
    found: dict[tuple[str, str], list[Any]] = {}
    for rank in ranks:
        for key, value in rank[moment].items():
            name, kind, share, start = key.rsplit("|", 3)
            found.setdefault((name, kind), []).append((int(share), int(start), value))
    return {
        key: np.concatenate([value for *_, value in sorted(parts, key=lambda part: part[:2])])
        for key, parts in found.items()
    }


def ledger(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The samples of each step, over all ranks."""
    steps = zip(*(rank["samples"] for rank in ranks), strict=True)
    return [sorted({sample for part in parts for sample in part}) for parts in steps]


def by_rank(world: int, jobs: list[Job]) -> list[list[dict[str, Any]]]:
    """Of each job the results of all ranks."""
    ranks = run_ranks(world, work, jobs, timeout_s=600)
    return [[rank[number] for rank in ranks] for number in range(len(jobs))]


@functools.cache
def unbroken(world: int) -> dict[Case, tuple[Path, list[dict[str, Any]]]]:
    """Case → (folder with its checkpoint, results by rank) of all steps at once."""
    jobs = [Job(case, Path(tempfile.mkdtemp())) for case in dict.fromkeys((*FROM, *SAME)) if case.world == world]
    return {job.case: (job.folder, found) for job, found in zip(jobs, by_rank(world, jobs), strict=True)}


@functools.cache
def continued(world: int) -> dict[Case, list[dict[str, Any]]]:
    """Case → results by rank of the steps behind its own checkpoint."""
    jobs = [Job(case, folder, BEFORE) for case, (folder, _) in unbroken(world).items() if case in SAME]
    return {job.case: found for job, found in zip(jobs, by_rank(world, jobs), strict=True)}


@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_same_layout_goes_on_bit_for_bit(case: Case) -> None:
    same(unbroken(case.world)[case][1], continued(case.world)[case])


@pytest.mark.parametrize("to", TO, ids=str)
def test_any_layout_goes_on_in_any_other(to: Case) -> None:
    """What the ranks hold is what was saved, bit for bit, and nothing saved is lost; and then the same losses."""
    # Many ranks on a few cores are slow. Who reads knows the saved layout by its stretches alone, so that half of the
    # pairs show what all do; `make test-all` takes all.
    cases = {8: FROM[2:3], 4: FROM[1:8:2]}.get(to.world, FROM)
    cases = cases if THOROUGH else cases[TO.index(to) % 2 :: 2] or cases
    jobs = [Job(to, unbroken(case.world)[case][0], BEFORE) for case in cases]
    worst: dict[Case, float] = {}
    for case, after in zip(cases, by_rank(to.world, jobs), strict=True):
        folder, before = unbroken(case.world)[case]
        expected = before[0]["losses"][BEFORE:]
        worst[case] = max(float(np.abs(np.array(rank["losses"]) / expected - 1).max()) for rank in after)
        assert all(rank["rates"] == before[0]["rates"][BEFORE:] for rank in after)
        assert ledger(after) == ledger(before)[BEFORE:]
        found = read(folder / "checkpoints" / f"step_{BEFORE:08d}")
        saved = SavedState(found.files, found.manifest["tensors"], found.manifest["layout"]["tensor"])
        held = whole(after, "at")
        assert {name for name, _ in held} == set(saved.names)
        for (name, kind), value in held.items():
            expected_value = saved.whole(name, kind)
            if to.tensor > 1 and (cut := cuts().get(name)):
                shares = [cut.take(expected_value, rank, to.tensor).reshape(-1) for rank in range(to.tensor)]
                expected_value = torch.cat(shares)
            assert np.array_equal(value, expected_value.reshape(-1).numpy()), f"{case}: {name}, {kind}"
    assert max(worst.values()) < RELATIVE, worst


@functools.cache
def cuts() -> dict[str, Cut]:
    """How tensor ranks divide the parameters of the model."""
    folder, _ = unbroken(2)[Case("llama", 1, tensor=2)]
    tensors = read(folder / "checkpoints" / f"step_{BEFORE:08d}").manifest["tensors"]
    return {name: Cut(*facts["cut"], tuple(facts["shape"])) for name, facts in tensors.items() if facts["cut"]}


def same(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The steps behind a checkpoint are those that the run took itself, bit for bit."""
    for rank, again in zip(before, after, strict=True):
        assert again["losses"] == rank["losses"][BEFORE:] and again["rates"] == rank["rates"][BEFORE:]
        for moment in ("at", "last"):
            assert again[moment].keys() == rank[moment].keys()
            for name, value in rank[moment].items():
                assert np.array_equal(again[moment][name], value), f"{moment}: {name}"


def test_every_optimizer_that_is_resumed(tmp_path: Path) -> None:
    """At each ZeRO stage that it has: the same layout bit for bit; another one to rounding."""
    cases = [(Case("llama", stage, data=2), optimizer) for optimizer, stages in OTHERS for stage in stages]
    assert {optimizer["name"] for optimizer, _ in OTHERS} | {"adamw", "lion"} == set(RESUMED)
    whole_runs = [Job(case, tmp_path / str(number), 0, optimizer) for number, (case, optimizer) in enumerate(cases)]
    again = [dataclasses.replace(job, first=BEFORE) for job in whole_runs]
    others = [
        dataclasses.replace(job, first=BEFORE, case=Case("llama", 0 if job.optimizer["name"] == "adagrad" else 1,
                                                         tensor=2))
        for job in whole_runs
    ]  # fmt: skip
    befores, afters, elsewhere = (by_rank(2, jobs) for jobs in (whole_runs, again, others))
    for before, after, other in zip(befores, afters, elsewhere, strict=True):
        same(before, after)
        np.testing.assert_allclose(other[0]["losses"], before[0]["losses"][BEFORE:], rtol=RELATIVE)


@pytest.mark.parametrize("optimizer", OFFLOADED, ids=lambda optimizer: optimizer["name"])
def test_an_offloaded_optimizer(optimizer: dict[str, Any], tmp_path: Path) -> None:
    """The same bit for bit; from and to the device to rounding, where there the optimizer is the same one."""
    jobs = [
        Job(Case("llama", stage, data=2), tmp_path / str(stage), optimizer=optimizer, offload="cpu")
        for stage in (1, 2, 3)
    ]
    if optimizer is ADAM:
        jobs.append(Job(Case("llama", 1, data=2), tmp_path / "device"))
    again = [dataclasses.replace(job, first=BEFORE) for job in jobs]
    # Of each the checkpoint of the one before.
    others = [
        dataclasses.replace(job, first=BEFORE, folder=before.folder)
        for job, before in zip(jobs, jobs[-1:] + jobs[:-1], strict=True)
    ]
    befores, afters, elsewhere = (by_rank(2, some) for some in (jobs, again, others))
    for number, (before, after) in enumerate(zip(befores, afters, strict=True)):
        same(before, after)
        np.testing.assert_allclose(
            elsewhere[number][0]["losses"], befores[number - 1][0]["losses"][BEFORE:], rtol=RELATIVE
        )


def test_parameters_that_are_not_trained(tmp_path: Path) -> None:
    """They are in the checkpoint, in any layout, and stay as they are."""
    names = ("model.embed_tokens", "model.layers.1.")
    cases = [Case("llama", stage, data=2) for stage in (0, 1, 2, 3)] + [Case("llama", 1, tensor=2)]
    jobs = [Job(case, tmp_path / str(number), frozen=names) for number, case in enumerate(cases)]
    again = [dataclasses.replace(job, first=BEFORE) for job in jobs]
    # Of each the checkpoint of the next.
    others = [
        dataclasses.replace(job, first=BEFORE, case=case) for job, case in zip(jobs, cases[1:] + cases[:1], strict=True)
    ]
    befores, afters, elsewhere = (by_rank(2, some) for some in (jobs, again, others))
    for job, before, after, other in zip(jobs, befores, afters, elsewhere, strict=True):
        same(before, after)
        np.testing.assert_allclose(other[0]["losses"], before[0]["losses"][BEFORE:], rtol=RELATIVE)
        found = read(job.folder / "checkpoints" / f"step_{BEFORE:08d}")
        saved = SavedState(found.files, found.manifest["tensors"], found.manifest["layout"]["tensor"])
        for name in saved.names:
            assert saved.has(name, "frozen") == name.startswith(names) != saved.has(name, "exp_avg")


def test_a_slow_disk(tmp_path: Path) -> None:
    """Training goes on beside a save that takes longer than its steps, and what is written is the state of its step."""
    cases = [Case("llama", stage, data=2) for stage in (0, 1, 3)]
    quick = [Job(case, tmp_path / f"quick_{case.stage}") for case in cases]
    slow = [dataclasses.replace(job, folder=tmp_path / f"slow_{job.case.stage}", slow_s=0.02) for job in quick]
    again = [dataclasses.replace(job, first=BEFORE) for job in slow]
    befores, slows, afters = by_rank(2, quick), by_rank(2, slow), by_rank(2, again)
    for before, beside, after in zip(befores, slows, afters, strict=True):
        assert all(rank["saved_s"] > rank["steps_s"] for rank in beside), "the steps waited for the disk"
        assert [rank["losses"] for rank in beside] == [rank["losses"] for rank in before]
        same(before, after)


class Full(OSError):
    """What the system says of a full disk."""

    def __init__(self) -> None:
        super().__init__(28, "No space left on device")


def saves_on_a_full_disk(rank: int, world: int, folder: Path) -> list[Any]:
    """Save once; then fail at each write of another save, and at its rename; then save again. What each one said."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import Progress
    from launch.runtime.saving import Saving
    from launch.runtime.staged import make_engine
    from launch.runtime.state import own_tensors

    cfg, layout = configured(Case("llama", 1, data=2))
    recipe = TinyCausalLM(cfg)
    recipe.prepare()
    engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), 2)
    said: list[str] = []
    saving = Saving(folder, 2, 0, asdict(cfg), "rows", said.append)

    def save(step: int) -> tuple[bool, str, list[str]]:
        saving.begin(engine, step, asdict(Progress(step=step)))
        whole = saving.finish()
        torch.distributed.barrier()
        left = sorted(entry.name for entry in folder.iterdir())
        torch.distributed.barrier()  # before anybody begins the next one
        return whole, said[-1], left

    found = [save(1)]
    parts, rename, last = tensor_file._parts, Path.rename, world - 1
    writes = sum(1 for _ in parts(b"", own_tensors(engine).values()))

    def failing(at: int):
        def some(head: bytes, values: Any):
            for number, part in enumerate(parts(head, values)):
                if number == at:
                    raise Full
                yield part

        return some

    for at in range(writes):
        tensor_file._parts = failing(at) if rank == last else parts
        found.append(save(2))
    tensor_file._parts = parts

    def no_rename(self: Path, target: Path) -> Path:
        raise Full

    Path.rename = no_rename  # type: ignore[method-assign]
    found.append(save(2))
    Path.rename = rename  # type: ignore[method-assign]
    write = Path.write_bytes

    def no_manifest(self: Path, data: bytes) -> int:
        raise Full

    Path.write_bytes = no_manifest  # type: ignore[method-assign]
    found.append(save(2))
    Path.write_bytes = write  # type: ignore[method-assign]
    found += [save(2), save(2)]
    if rank == 0:  # killed between the two renames of the second one
        whole = folder / "step_00000002"
        whole.rename(folder / ".step_00000002.old")
        saving.sweep()
        assert read(whole).damage() == []
    return found


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    """At each write of a rank's file, manifest and rename: all ranks say the same, nothing half is left."""
    ranks = run_ranks(2, saves_on_a_full_disk, tmp_path)
    assert ranks[0] == ranks[1]
    first, *failed, again, twice = ranks[0]
    assert twice == again
    assert first == (True, "step 1: checkpoint", ["step_00000001"])
    assert again == (True, "step 2: checkpoint", ["step_00000001", "step_00000002"])
    assert len(failed) > 20
    for whole, said, left in failed:
        assert not whole and "no checkpoint" in said and "No space left" in said and left == ["step_00000001"]


def back_to_the_start(rank: int, world: int, stages: list[int], folder: Path) -> list[list[float]]:
    """Of each stage: losses of three steps, and of three steps again behind a rewind to before the first."""
    from launch.runtime.checkpoint import newest
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import Progress, training_batches
    from launch.runtime.saving import Saving
    from launch.runtime.session import restored
    from launch.runtime.staged import make_engine

    found = []
    for stage in stages:
        cfg, layout = configured(Case("llama", stage, data=2))
        recipe = TinyCausalLM(cfg)
        recipe.prepare()
        engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), 5)
        saving = Saving(folder / str(stage), 2, 0, asdict(cfg), "rows")
        saving.begin(engine, 0, asdict(Progress()))
        losses = []
        for _ in range(2):
            for step in range(3):
                batches = training_batches(step, layout.place(rank).data, recipe, cfg, layout)
                losses.append(engine.train_step(batches).loss)
            saving.finish()
            start = newest(folder / str(stage))
            assert start is not None
            restored(engine, start, layout)
        found.append(losses)
        engine.ds.destroy()
    return found


def test_a_rewind_to_before_the_first_step_forgets_the_optimizers_state(tmp_path: Path) -> None:
    """There is none in the checkpoint: what the engine has by then must not stay."""
    for losses in run_ranks(2, back_to_the_start, [0, 1, 2, 3], tmp_path)[0]:
        assert losses[:3] == losses[3:]
