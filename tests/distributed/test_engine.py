"""The engine interface beyond gradients: evaluation, export, bad numbers, the other optimizers and precisions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import LENGTH, VOCABULARY, TinyCausalLM, plain_model, tiny_config

from conf.batch import Layout

pytestmark = pytest.mark.slow


def test_bits_per_byte() -> None:
    """Nats of all supervised tokens, in bits, over the bytes of their text: whatever the vocabulary."""
    recipe = object.__new__(TinyCausalLM)
    recipe.__dict__["_held_out_bytes"] = 1000
    assert recipe.metrics(2.0, 300)["bits_per_byte"] == pytest.approx(2.0 * 300 / math.log(2) / 1000)


def make(world: int, stage: int = 1, accumulation: int = 1, **changes):
    """(engine, recipe, cfg, layout) of a tiny run; `changes` are `section__field=value`."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.staged import make_engine

    cfg = tiny_config(8 // world // accumulation, accumulation, world)
    cfg.zero.stage, cfg.zero.param_persistence_threshold = stage, 0
    for path, value in changes.items():
        section, _, field = path.partition("__")
        setattr(getattr(cfg, section), field, value)
    layout = Layout.of(world, cfg.parallel)
    recipe = TinyCausalLM(cfg)
    recipe.prepare()
    return make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), 5), recipe, cfg, layout


def step_losses(rank: int, world: int, options: list[dict]) -> list[list[float]]:
    from launch.runtime.loop import training_batches

    results = []
    for option in options:
        engine, recipe, cfg, layout = make(world, **option)
        results.append(
            [engine.train_step(training_batches(s, rank, recipe, cfg, layout)).loss for s in range(cfg.train.steps)]
        )
        engine.ds.destroy()
    return results


def evaluation(rank: int, world: int, stage: int) -> dict:
    from launch.runtime.loop import held_out_batches

    engine, recipe, cfg, layout = make(world, stage)
    return engine.evaluate(held_out_batches(rank, recipe, cfg, layout)).metrics


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_held_out_row_counts_once(world: int) -> None:
    """13 rows, 2 a micro-batch: uneven on every number of ranks above one."""
    recipe = TinyCausalLM(tiny_config(1, 1, 1))
    recipe.prepare()
    rows = [recipe.held_out.row(i) for i in range(len(recipe.held_out))]
    ids, labels, positions = (
        torch.tensor(np.stack([r[k] for r in rows])) for k in ("input_ids", "labels", "position_ids")
    )
    with torch.no_grad():
        logits = plain_model(recipe)(input_ids=ids, position_ids=positions).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    for metrics in run_ranks(world, evaluation, 3):
        assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def exported(rank: int, world: int, stage: int, folder: Path, shard_bytes: int) -> np.ndarray:
    from launch.runtime.export import export
    from launch.runtime.loop import training_batches

    engine, recipe, cfg, layout = make(world, stage)
    engine.train_step(training_batches(0, rank, recipe, cfg, layout))
    export(engine, recipe, folder, rank == 0, shard_bytes)
    torch.distributed.barrier()
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    engine.ds.eval()
    with torch.no_grad():
        return engine.ds(input_ids=ids, use_cache=False).logits.numpy()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_exported_model_gives_the_logits_of_training(stage: int, shard_bytes: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    trained = run_ranks(2, exported, stage, folder, shard_bytes)[0]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 2**20 else len(files) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(LENGTH)[None] % VOCABULARY).logits.numpy()
    np.testing.assert_array_equal(logits, trained)


class Poisoned(TinyCausalLM):
    """Makes the loss or the gradient of one rank's micro-batch infinite."""

    where = "loss"

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if not torch.distributed.get_rank() or not torch.is_grad_enabled():
            return loss
        return loss * float("inf") if self.where == "loss" else _InfiniteGradient.apply(loss)


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        return d * float("inf")


def poisoned(rank: int, world: int, stage: int, precision: str, where: str) -> tuple[str, bool]:
    import copy

    from launch.runtime import loop
    from launch.runtime.engine import NonFiniteError

    accumulation = "fp32" if stage or precision == "fp32" else "bf16"
    engine, recipe, cfg, layout = make(
        world, stage, precision__name=precision, precision__accumulation_dtype=accumulation
    )
    bad = Poisoned(cfg)
    bad.__dict__.update(recipe.__dict__)
    bad.where = where
    before = {name: copy.deepcopy(value) for name, value in engine.stream()}
    engine.recipe = bad
    try:
        loop.run(engine, bad, cfg, layout, rank, 2, lambda row: None)
        message = ""
    except NonFiniteError as error:
        message = str(error)
    return message, all(torch.equal(before[name], value) for name, value in engine.stream())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(
    "stage, precision", [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_bad_numbers_stop_before_the_update(stage: int, precision: str, where: str) -> None:
    for rank, (message, unchanged) in enumerate(run_ranks(2, poisoned, stage, precision, where)):
        assert f"step 1, rank {rank}" in message and "sample indices" in message
        assert unchanged


BAD_STEPS = [
    {"stage": stage, "precision__name": precision, "precision__accumulation_dtype": accumulation}
    for stage, precision, accumulation in (
        (0, "fp32", "fp32"), (1, "fp32", "fp32"), (2, "fp32", "fp32"), (3, "fp32", "fp32"), (0, "bf16", "bf16"),
        (1, "bf16", "fp32"), (3, "bf16", "fp32"),
    )
]  # fmt: skip


def skipped(rank: int, world: int, options: list[dict]) -> list[dict]:
    """Of each engine: whether a bad step, by its loss, its norm or an infinite gradient, left weights and state alone.

    And the losses of the good steps around them, with their rates.
    """
    from launch.runtime.engine import BadStepError
    from launch.runtime.loop import training_batches
    from launch.runtime.state import own_tensors

    verdicts = {
        1: lambda loss, norm: "a loss" if loss is not None else None,
        3: lambda loss, norm: "a norm" if norm is not None else None,
    }
    if world == 1:  # where nobody is poisoned
        verdicts[5] = lambda loss, norm: "inf" if loss is not None else None
    found = []
    for option in options:
        engine, recipe, cfg, layout = make(world, accumulation=2, **option)
        bad = Poisoned(cfg)
        bad.__dict__.update(recipe.__dict__)
        bad.where = "gradient"
        result: dict = {"unchanged": [], "losses": [], "rates": [], "said": []}
        for step in range(7):
            before = {name: value.clone() for name, value in own_tensors(engine).items() if not name.startswith("rng")}
            engine.recipe = bad if step == 5 else recipe
            try:
                done = engine.train_step(
                    training_batches(step, rank, recipe, cfg, layout),
                    verdict=verdicts.get(step, lambda loss, norm: None),
                )
                result["losses"].append(done.loss)
                result["rates"].append(done.lr)
            except BadStepError as error:
                result["said"].append(str(error))
                after = own_tensors(engine)
                result["unchanged"].append(all(torch.equal(value, after[name]) for name, value in before.items()))
        found.append(result)
        engine.ds.destroy()
    return found


def test_a_bad_step_leaves_everything_alone_and_the_next_is_as_ever() -> None:
    """deepspeed 0.19.8 has no call for it: at every ZeRO stage and precision, with accumulation."""
    alone = run_ranks(1, skipped, BAD_STEPS[:1])[0][0]
    for options, result in zip(BAD_STEPS, run_ranks(2, skipped, BAD_STEPS)[1], strict=True):
        assert result["unchanged"] == [True] * 3, options
        assert result["said"][:2] == ["a loss", "a norm"] and result["said"][2][-3:] in ("inf", "nan"), options
        np.testing.assert_allclose(result["rates"], alone["rates"], err_msg=str(options))
        tolerance = 1e-5 if options["precision__name"] == "fp32" else 2**-8
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=tolerance, err_msg=str(options))


def test_a_spike_is_measured_against_the_latest_good_steps() -> None:
    from conf.schema import FaultsConfig
    from launch.runtime.bad_steps import Guard
    from launch.runtime.engine import StepResult
    from launch.runtime.loop import Progress

    guard = Guard(FaultsConfig(on_bad_step="skip", spike=3.0, bad_steps=2), Progress())
    for _ in range(4):
        guard.saw(StepResult(2.0, 1.0, 1e-3, 1, 1, True))
    assert guard.verdict(1e3, None) is None  # too few to say what is usual
    guard.saw(StepResult(2.0, 1.0, 1e-3, 1, 1, True))
    assert guard.verdict(5.9, 2.9) is None
    assert "loss is 6.2, 3.1 times its median" in str(guard.verdict(6.2, None))
    assert "gradient norm is 4" in str(guard.verdict(None, 4.0))
    assert [guard.action() for _ in range(3)] == ["skip", "skip", "stop"]
    guard.saw(StepResult(2.0, 1.0, 1e-3, 1, 1, True))
    assert guard.action() == "skip"


def compared(rank: int, world: int, mine: list[dict]) -> str:
    from conf.errors import RequestError
    from launch.runtime.fingerprint import compare

    try:
        compare(mine[rank], "request")
    except RequestError as error:
        return error.render()
    return ""


def test_ranks_that_do_not_do_the_same_run_are_told() -> None:
    facts = [{"seed": 1, "data": {"path": "a"}, "parameters": {"stage 0": 3}}, {"seed": 1, "data": {"path": "b"}}]
    for said in run_ranks(2, compared, facts):
        assert "data.path=b" in said and "on rank 1, and a on rank 0" in said and "seed" not in said
    assert run_ranks(2, compared, [facts[0], facts[0]]) == ["", ""]


def test_precisions_agree_with_fp32_to_their_own_rounding() -> None:
    """bf16 keeps 8 bits: 2**-8 of the loss; five steps at lr 1e-3 stay within it."""
    fp32, *others = run_ranks(
        2,
        step_losses,
        [
            {},
            {"precision__name": "bf16_autocast"},
            {"precision__name": "bf16"},
            {"precision__name": "bf16", "stage": 3},
            {"precision__name": "bf16", "stage": 0, "precision__accumulation_dtype": "bf16"},
        ],
    )[0]
    for losses in others:
        np.testing.assert_allclose(losses, fp32, rtol=2**-8)
        assert losses != fp32


def test_accelerations_change_nothing_but_time() -> None:
    """fused loss, fused optimizer: each equals the run without it; compile is in its own, slower test."""
    plain, *others = run_ranks(
        2,
        step_losses,
        [
            {"train__fused_loss": False},
            {"train__fused_loss": True},
            {"train__fused_loss": True, "optimizer__fused": True},
            {"train__fused_loss": True, "accumulation": 4, "stage": 2},
        ],
    )[0]
    for losses in others:
        np.testing.assert_allclose(losses, plain, rtol=1e-6)


@pytest.mark.slow
def test_compiled_layers_change_nothing_but_time() -> None:
    """Under ZeRO-3, where the engine's hooks sit between the compiled layers."""
    plain, compiled = run_ranks(2, step_losses, [{}, {"train__compile": True, "stage": 3}], timeout_s=600)[0]
    np.testing.assert_allclose(compiled, plain, rtol=1e-6)


def two_groups(rank: int, world: int) -> list[float]:
    """Sums over the ranks before and after the process group was closed and made anew."""
    from launch.runtime import processes

    sums = []
    for _ in range(2):
        ranks = processes.Ranks(rank, rank, world, world)
        processes.join(ranks, "cpu", 1)
        one = torch.ones(1)
        deepspeed_sum(one)
        sums.append(one.item())
        torch.distributed.barrier()
        processes.leave()
    processes.join(ranks, "cpu", 1)  # the helper's own barrier waits at the end
    return sums


def deepspeed_sum(value: torch.Tensor) -> None:
    from deepspeed import comm

    comm.all_reduce(value)


def test_a_second_run_in_one_process_has_its_own_process_group() -> None:
    """deepspeed 0.19.8 keeps groups that torch's own destroy_process_group has ended."""
    assert run_ranks(2, two_groups) == [[2.0, 2.0], [2.0, 2.0]]
