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
from launch.runtime.engine import Engine, Evaluation, NonFiniteError
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
    order = recipe.held_out_order()
    rows = len(order)
    # A micro-batch is filled up to its size: no larger than one rank's share.
    size = min(cfg.eval.micro_size or sizes(cfg.batch)[1], -(-rows // layout.data))
    for first in range(0, rows, size * layout.data):
        mine = range(first + rank * size, min(first + (rank + 1) * size, rows))
        yield recipe.collate([recipe.held_out.row(order[i]) for i in mine], size)


@dataclass
class Progress:
    """How far a run is, as far as the engine's own state does not say it; part of every checkpoint."""

    step: int = 0
    """Optimizer steps that were taken."""
    tokens: int = 0
    first: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    last: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the model that was kept: after the last step, or at the best evaluation."""
    kept_at: int = 0
    """The step after which the kept model was evaluated."""
    best: float | None = None
    """The best value of `eval.metric` so far."""
    waiting: int = 0
    """Evaluations since then."""
    evaluated_at: int = -1
    """The step after which there was an evaluation last."""


class Judge:
    """Which evaluation is the best one by `eval.metric`, and when to stop waiting for a better one."""

    def __init__(self, cfg: Config, recipe: Recipe, progress: Progress):
        self._metric, self._patience, self._progress = cfg.eval.metric, cfg.eval.patience, progress
        self._largest = self._metric is not None and recipe.METRICS[self._metric] == "max"

    def is_better(self, metrics: dict[str, float]) -> bool:
        """Whether these metrics are the best so far; without a metric the latest ones always are."""
        if self._metric is None:
            return True
        if self._metric not in metrics:
            raise RuntimeError(f"eval.metric={self._metric}: this data set has {', '.join(metrics)}")
        value, best = metrics[self._metric], self._progress.best
        better = best is None or (value > best if self._largest else value < best)
        self._progress.waiting = 0 if better else self._progress.waiting + 1
        if better:
            self._progress.best = value
        return better

    @property
    def has_enough(self) -> bool:
        return self._patience is not None and self._progress.waiting >= self._patience


def run(
    engine: Engine, recipe: Recipe, cfg: Config, layout: Layout, rank: int, steps: int,
    log: Callable[[Row], None], keep: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Progress | None = None, after_step: Callable[[Progress], bool] = lambda progress: True,
) -> Progress:  # fmt: skip
    """Train up to `steps` optimizer steps, evaluating before the first, every `eval.every` and after the last.

    `log` gets one row per step and one per evaluation (with `split`). `keep` is called by all ranks with the evaluation
    of a model that is to be kept: each time `eval.metric` is better than before, or without one after the last step.
    progress: where an earlier run stopped; it is carried on and returned. `after_step` is called after each step, its
    row and its evaluation, and ends the run by False.
    Raises NonFiniteError, with step, rank and sample indices, before a bad update reaches the weights.
    """
    progress = progress or Progress()
    data_rank = layout.place(rank).data
    judge = Judge(cfg, recipe, progress)

    def evaluate() -> Evaluation:
        started = time.perf_counter()
        evaluation = engine.evaluate(held_out_batches(data_rank, recipe, cfg, layout))
        metrics, step = evaluation.metrics, progress.step
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteError(f"after step {step}: the held-out loss is {metrics['loss']}; no model is exported")
        log({"step": step, "split": "held_out", **metrics, "eval_s": round(time.perf_counter() - started, 3)})
        progress.evaluated_at = step
        return evaluation

    def judged(last: bool) -> bool:
        """Evaluate, keep the model if it is to be kept, and say whether to go on."""
        evaluation = evaluate()
        if judge.is_better(evaluation.metrics) and (last or cfg.eval.metric is not None):
            progress.last, progress.kept_at = evaluation.metrics, progress.step
            keep(evaluation)
        return not judge.has_enough

    if progress.evaluated_at < 0:
        progress.first = progress.last = evaluate().metrics
    while progress.step < steps:
        step = progress.step
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
        progress.step += 1
        progress.tokens += result.tokens
        log(
            {
                "step": progress.step,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens": progress.tokens,
                "samples": progress.step * sizes(cfg.batch)[0],
                "tokens_per_s": result.tokens / seconds,
                "padding": round(result.padding, 4),
                "step_s": seconds,
                "peak_memory_bytes": engine.peak_memory_bytes(),
                **({} if result.bubble is None else {"bubble": result.bubble}),
                **({} if result.applied else {"skipped": True}),
            }
        )
        last = progress.step == steps
        if (last or (cfg.eval.every and progress.step % cfg.eval.every == 0)) and not judged(last):
            break
        if not after_step(progress):
            break
    return progress
