"""Every optimizer trains the same model at every ZeRO stage and number of ranks, or the combination is refused.

The last two tests pin what deepspeed 0.19.8 does where `conf/rules_optimizer.py` refuses: when they fail, the engine
has changed and the rule may go.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_engine import make

pytestmark = pytest.mark.slow
SETTINGS: dict[str, dict] = {
    "adam": {"betas": [0.9, 0.95], "eps": 1e-8},
    "adamw": {"betas": [0.9, 0.95], "eps": 1e-8},
    "sgd": {"betas": None, "eps": None, "momentum": 0.9},
    "muon": {"betas": [0.9, 0.95], "eps": 1e-8, "momentum": 0.95, "gradient_clipping": 0.0},
    "nadam": {"betas": [0.9, 0.95], "eps": 1e-8},
    "rmsprop": {"betas": None, "eps": 1e-8, "momentum": 0.0},
    "adagrad": {"betas": None, "eps": 1e-10},
}


def options(name: str, stage: int, **more: object) -> dict:
    return {
        "stage": stage,
        "optimizer__name": name,
        **{f"optimizer__{k}": v for k, v in SETTINGS[name].items()},
        **more,
    }


def run(rank: int, world: int, wanted: list[dict]) -> list:
    """Five (loss, norm) pairs for each wanted run, or the name of the exception."""
    from launch.runtime.loop import training_batches

    results = []
    for option in wanted:
        try:
            engine, recipe, cfg, layout = make(world, **option)
            steps = [engine.train_step(training_batches(s, rank, recipe, cfg, layout)) for s in range(5)]
            results.append([(step.loss, step.grad_norm) for step in steps])
            engine.ds.destroy()
        except Exception as error:
            results.append(type(error).__name__)
    torch.distributed.barrier()
    return results


def test_stages_and_ranks_train_the_same_model() -> None:
    names = [name for name in SETTINGS if name != "adagrad"]
    alone = run_ranks(1, run, [options(name, 0) for name in names])[0]
    wanted = [(name, stage) for name in names for stage in (0, 1, 2, 3)]
    sharded = run_ranks(2, run, [options(name, stage) for name, stage in wanted])[0]
    for (name, stage), steps in zip(wanted, sharded, strict=True):
        expected = alone[names.index(name)]
        for (loss, norm), (loss0, norm0) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(loss0, rel=1e-5), f"{name}, stage {stage}"
            if name == "muon" and stage:
                assert norm is None, "the engine's norm is that of the update, not of the gradient"
            else:
                assert norm == pytest.approx(norm0, rel=1e-4), f"{name}, stage {stage}"


def test_adagrad_at_stage_0() -> None:
    alone, pair = run_ranks(1, run, [options("adagrad", 0)])[0][0], run_ranks(2, run, [options("adagrad", 0)])[0][0]
    np.testing.assert_allclose(pair, alone, rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_0_19_8_loses_the_groups_of_adagrad(stage: int) -> None:
    assert run_ranks(1, run, [options("adagrad", stage)])[0] == ["IndexError"]


def test_deepspeed_0_19_8_clips_the_update_of_muon() -> None:
    clipped = {"optimizer__gradient_clipping": 0.5}
    whole, sharded = run_ranks(1, run, [options("muon", 0, **clipped), options("muon", 1, **clipped)])[0]
    assert abs(whole[-1][0] - sharded[-1][0]) > 1e-4
