"""Gradients of every layout equal those of plain PyTorch, parameter by parameter, before clipping.

Per parameter, because Adam hides a uniform scaling of the gradient and clipping hides it too.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from ranks import run_ranks
from support.tiers import THOROUGH
from tiny import TinyCausalLM, plain_model, tiny_config

from conf.batch import Layout

WORLDS, STAGES, ACCUMULATIONS, CHECKPOINTING = (1, 2, 4), (0, 1, 2, 3), (1, 2, 4), (0, 1)
GLOBAL, STEPS = 16, 5
RELATIVE = 1e-5
"""Sums in another order leave 4e-7 in the first fp32 gradient; Adam, which divides by small gradients, keeps it."""


def engine_run(rank: int, world: int, combinations: list[tuple]) -> dict:
    """Losses, norms and gradients of STEPS steps for each (stage, accumulation, checkpointing, model overrides)."""
    from launch.runtime.ds_config import ds_config
    from launch.runtime.loop import training_batches
    from launch.runtime.staged import make_engine

    results = {}
    for stage, accumulation, checkpointing in combinations:
        cfg = tiny_config(GLOBAL // accumulation // world, accumulation, world)
        cfg.zero.stage, cfg.train.activation_checkpointing = stage, checkpointing
        cfg.zero.param_persistence_threshold = 0
        layout = Layout.of(world, cfg.parallel)
        recipe = TinyCausalLM(cfg)
        recipe.prepare()
        engine = make_engine(recipe, cfg, layout, ds_config(cfg, layout, "cpu"), torch.device("cpu"), STEPS)
        steps = []
        for step in range(STEPS):
            gradients = {}

            def inspect(e, into=gradients):
                into.update({name: g.clone() for name, g in e.gradients()})

            result = engine.train_step(training_batches(step, rank, recipe, cfg, layout), inspect)
            steps.append(
                (result.loss, result.grad_norm, {k: v.numpy() for k, v in gradients.items()} if rank == 0 else {})
            )
        results[stage, accumulation, checkpointing] = steps
        engine.ds.destroy()
    return results


@functools.cache
def reference() -> list[tuple]:
    """The same model, rows and optimizer in plain PyTorch: one process, one batch, mean over supervised tokens."""
    cfg = tiny_config(GLOBAL, 1, 1)
    recipe = TinyCausalLM(cfg)
    recipe.prepare()
    model = plain_model(recipe)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(STEPS):
        rows = [recipe.train.row(i) for i in range(step * GLOBAL, (step + 1) * GLOBAL)]
        ids, labels, positions = (
            torch.tensor(np.stack([r[k] for r in rows])) for k in ("input_ids", "labels", "position_ids")
        )
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        gradients = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        steps.append((loss.item(), norm.item(), gradients))
        optimizer.step()
        optimizer.zero_grad()
    return steps


ALL = list(itertools.product(WORLDS, STAGES, ACCUMULATIONS, CHECKPOINTING))
THREE_WAY = [case for case in ALL if (WORLDS.index(case[0]) + case[1] + ACCUMULATIONS.index(case[2])) % 2 == case[3]]
"""Every world with every stage and accumulation, which meet in one place; checkpointing with every two of them."""
CASES = ALL if THOROUGH else THREE_WAY


def marked(case: tuple) -> object:
    return pytest.param(*case, marks=[] if case[0] == 2 else pytest.mark.slow)


@functools.cache
def runs(world: int) -> dict:
    return run_ranks(world, engine_run, [case[1:] for case in CASES if case[0] == world])[0]


@pytest.mark.parametrize("world, stage, accumulation, checkpointing", map(marked, CASES))
def test_gradients_equal_plain_pytorch(world: int, stage: int, accumulation: int, checkpointing: int) -> None:
    steps = runs(world)[stage, accumulation, checkpointing]
    for number, ((loss, norm, gradients), (loss0, norm0, gradients0)) in enumerate(
        zip(steps, reference(), strict=True)
    ):
        assert loss == pytest.approx(loss0, rel=RELATIVE), f"step {number}"
        assert norm == pytest.approx(norm0, rel=RELATIVE), f"step {number}"
        assert gradients.keys() == gradients0.keys()
        for name, gradient in gradients.items():
            error = np.linalg.norm(gradient - gradients0[name]) / np.linalg.norm(gradients0[name])
            assert error < RELATIVE, f"step {number}, {name}: relative error {error:.1e}"


def test_the_subset_has_every_pair() -> None:
    """And all three of world, stage and accumulation."""
    for axes in [(0, 1, 2), (0, 3), (1, 3), (2, 3)]:
        assert {tuple(case[axis] for axis in axes) for case in THREE_WAY} == {
            tuple(case[axis] for axis in axes) for case in ALL
        }
