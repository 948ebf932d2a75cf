"""The training loop. There is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.batch import Layout, sizes
from conf.schema import Config
from launch.runtime.engine import Engine, NonFiniteError
from recipes.base import Recipe

Row = dict[str, Any]


def sample_indices(step: int, rank: int, cfg: Config, layout: Layout) -> list[range]:
    """Global sample indices of the micro-batches of data rank `rank`. Step s takes [s·G, (s+1)·G) in every layout."""
    global_size, micro, accumulation = sizes(cfg.batch)
    firsts = [step * global_size + (m * layout.data + rank) * micro for m in range(accumulation)]
    return [range(first, first + micro) for first in firsts]


def training_batches(step: int, rank: int, recipe: Recipe, cfg: Config, layout: Layout) -> list[dict[str, np.ndarray]]:
    """The micro-batches of data rank `rank` in optimizer step `step`."""
    parts = sample_indices(step, rank, cfg, layout)
    return [recipe.collate([recipe.train.row(i) for i in part], len(part)) for part in parts]


def held_out_batches(rank: int, recipe: Recipe, cfg: Config, layout: Layout) -> Iterator[dict[str, np.ndarray]]:
    """The share of data rank `rank` in the held-out rows, each row on exactly one; out of rows, empty ones.

    Every rank yields equally many micro-batches: under ZeRO-3 a forward pass is a collective call.
    """
    rows = len(recipe.held_out)
    # A micro-batch is filled up to its size: no larger than one rank's share.
    size = min(cfg.eval.micro_size or sizes(cfg.batch)[1], -(-rows // layout.data))
    for first in range(0, rows, size * layout.data):
        mine = range(first + rank * size, min(first + (rank + 1) * size, rows))
        yield recipe.collate([recipe.held_out.row(i) for i in mine], size)


@dataclass
class Outcome:
    """What a run amounts to."""

    steps: int
    tokens: int
    first: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    last: dict[str, float] = field(default_factory=dict)
    """Held-out metrics after the last step."""


def run(
    engine: Engine, recipe: Recipe, cfg: Config, layout: Layout, rank: int, steps: int, log: Callable[[Row], None]
) -> Outcome:
    """Train for `steps` optimizer steps, evaluating before the first, every `eval.every` and after the last.

    `log` gets one row per step and one per evaluation (with `split`). Raises NonFiniteError, with step, rank and sample
    indices, before a bad update reaches the weights.
    """
    outcome = Outcome(steps, 0)
    data_rank = layout.place(rank).data

    def evaluate(step: int) -> dict[str, float]:
        started = time.perf_counter()
        metrics = engine.evaluate(held_out_batches(data_rank, recipe, cfg, layout))
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteError(f"after step {step}: the held-out loss is {metrics['loss']}; no model is exported")
        log({"step": step, "split": "held_out", **metrics, "eval_s": round(time.perf_counter() - started, 3)})
        return metrics

    outcome.first = outcome.last = evaluate(0)
    for step in range(steps):
        started = time.perf_counter()
        try:
            result = engine.train_step(training_batches(step, data_rank, recipe, cfg, layout))
        except NonFiniteError as error:
            samples = [list(part) for part in sample_indices(step, data_rank, cfg, layout)]
            raise NonFiniteError(
                f"step {step + 1}, rank {rank}: {error}; this rank's sample indices: {samples}. "
                "The weights are those of the step before."
            ) from None
        seconds = time.perf_counter() - started
        outcome.tokens += result.tokens
        log(
            {
                "step": step + 1,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": outcome.tokens,
                "samples": (step + 1) * sizes(cfg.batch)[0],
                "tokens_per_s": result.tokens / seconds,
                "step_s": seconds,
                "peak_memory_bytes": engine.peak_memory_bytes(),
                **({} if result.bubble is None else {"bubble": result.bubble}),
                **({} if result.applied else {"skipped": True}),
            }
        )
        if step + 1 == steps or (cfg.eval.every and (step + 1) % cfg.eval.every == 0):
            outcome.last = evaluate(step + 1)
    return outcome
