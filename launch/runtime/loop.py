"""The training loop. There is one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conf.batch import Layout, sizes
from conf.errors import Problem, RequestError, did_you_mean
from conf.schema import Config
from launch.runtime.bad_steps import Guard
from launch.runtime.engine import BadStepError, Engine, Evaluation, NonFiniteError, StepResult
from recipes.base import Recipe

Row = dict[str, Any]


def sample_indices(batch: int, rank: int, cfg: Config, layout: Layout) -> list[range]:
    """Global sample indices of the micro-batches of data rank `rank`. Batch b is [b·G, (b+1)·G) in every layout."""
    global_size, micro, accumulation = sizes(cfg.batch)
    firsts = [batch * global_size + (m * layout.data + rank) * micro for m in range(accumulation)]
    return [range(first, first + micro) for first in firsts]


def training_batches(batch: int, rank: int, recipe: Recipe, cfg: Config, layout: Layout) -> list[dict[str, np.ndarray]]:
    """The micro-batches of data rank `rank` of a global batch."""
    parts = sample_indices(batch, rank, cfg, layout)
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
    passed_over: list[int] = field(default_factory=list)
    """Global batches that are not learned from: bad ones, after a rewind."""
    rows: int = 0
    """Rows of metrics so far."""
    value: float | None = None
    """`eval.metric` at the last evaluation."""
    recent: list[list[float]] = field(default_factory=list)
    """(loss, norm of the gradient) of the latest good steps; what `faults.spike` is measured against."""

    @property
    def batch(self) -> int:
        """The global batch of the next step."""
        batch = self.step
        for bad in sorted(self.passed_over):
            batch += bad <= batch
        return batch


class RewindError(Exception):
    """A bad step is to be undone: the run goes on from its last checkpoint, without this global batch."""

    def __init__(self, batch: int):
        super().__init__(f"global batch {batch} is passed over")
        self.batch = batch


class Judge:
    """Which evaluation is the best one by `eval.metric`, and when to stop waiting for a better one."""

    def __init__(self, cfg: Config, recipe: Recipe, progress: Progress):
        self._metric, self._patience, self._progress = cfg.eval.metric, cfg.eval.patience, progress
        self._largest = self._metric is not None and recipe.METRICS[self._metric] == "max"

    def is_better(self, metrics: dict[str, float]) -> bool:
        """Whether these metrics are the best so far; without a metric the latest ones always are."""
        if self._metric is None:
            return True
        self.check(metrics)
        value, best = metrics[self._metric], self._progress.best
        self._progress.value = value
        better = best is None or (value > best if self._largest else value < best)
        self._progress.waiting = 0 if better else self._progress.waiting + 1
        if better:
            self._progress.best = value
        return better

    def check(self, metrics: dict[str, float]) -> None:
        """Which metrics there are may depend on the rows. Raises RequestError (eval.metric) where it is not there."""
        if self._metric is not None and self._metric not in metrics:
            near = did_you_mean(self._metric, metrics) or next(iter(metrics))
            rule = f"with these data there are {', '.join(metrics)}"
            raise RequestError(Problem("eval.metric", self._metric, rule, f"eval.metric={near}"))

    @property
    def has_enough(self) -> bool:
        return self._patience is not None and self._progress.waiting >= self._patience


def run(
    engine: Engine, recipe: Recipe, cfg: Config, layout: Layout, rank: int, steps: int,
    log: Callable[[Row], None], keep: Callable[[Evaluation], None] = lambda evaluation: None,
    progress: Progress | None = None, after_step: Callable[[Progress, bool], object] = lambda progress, last: None,
    bad_step: Callable[[Row], None] = lambda row: None, check: Callable[[str], None] = lambda what: None,
) -> Progress:  # fmt: skip
    """Train up to `steps` optimizer steps, evaluating before the first, every `eval.every` and after the last.

    `log` gets one row per step and one per evaluation (with `split`). `keep` is called by all ranks with the evaluation
    of a model that is to be kept: each time `eval.metric` is better than before, or without one after the last step.
    progress: where an earlier run stopped; it is carried on and returned. `after_step` is called after each step, its
    row and its evaluation, and told whether it was the last one. `check` is called before each step and between the
    parts of an evaluation, by all ranks at the same places, with a word for what follows, and may raise. `bad_step`
    gets a row about each step without an update.
    Raises BadStepError, with step, rank and sample indices, where `faults.on_bad_step` is stop, and RewindError where
    it is rewind; the weights are those of the step before.
    """
    progress = progress or Progress()
    data_rank = layout.place(rank).data
    judge = Judge(cfg, recipe, progress)
    guard = Guard(cfg.faults, progress)

    def write(row: Row) -> None:
        progress.rows += 1
        log(row)

    def checked(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            check(f"the evaluation after step {progress.step}")
            yield batch

    def evaluate() -> Evaluation:
        started = time.perf_counter()
        evaluation = engine.evaluate(checked(held_out_batches(data_rank, recipe, cfg, layout)))
        metrics, step = evaluation.metrics, progress.step
        judge.check(metrics)
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteError(f"after step {step}: the held-out loss is {metrics['loss']}; no model is exported")
        progress.evaluated_at = step
        write({"step": step, "split": "held_out", **metrics, "eval_s": round(time.perf_counter() - started, 3)})
        return evaluation

    def judged(last: bool) -> bool:
        """Evaluate, keep the model if it is to be kept, and say whether to go on."""
        before = replace(progress)
        evaluation = evaluate()
        if judge.is_better(evaluation.metrics) and (last or cfg.eval.metric is not None):
            progress.last, progress.kept_at = evaluation.metrics, progress.step
            try:
                keep(evaluation)
            except BaseException:  # a model that is not kept was not judged: who goes on from here does it again
                vars(progress).update(vars(before))
                raise
        return not judge.has_enough

    def take_step() -> None:
        batch = progress.batch
        started = time.perf_counter()
        result: StepResult | None = None
        try:
            result = engine.train_step(training_batches(batch, data_rank, recipe, cfg, layout), verdict=guard.verdict)
        except BadStepError as error:
            answer_to(error, batch)
        seconds = time.perf_counter() - started
        progress.step += 1
        loss = lr = norm = None
        if result is not None:
            guard.saw(result)
            progress.tokens += result.tokens
            loss, lr, norm = result.loss, result.lr, result.grad_norm
        samples = progress.step * sizes(cfg.batch)[0]
        row: Row = {"step": progress.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": progress.tokens}
        row |= {"samples": samples, "tokens_per_s": result.tokens / seconds if result is not None else None}
        row |= {"padding": round(result.padding, 4) if result is not None else None, "step_s": seconds}
        row |= {"peak_memory_bytes": engine.peak_memory_bytes()}
        optional = {"router_aux_loss": result.router_aux_loss, "bubble": result.bubble} if result is not None else {}
        row |= {name: value for name, value in optional.items() if value is not None}
        write(row | ({} if result is not None and result.applied else {"skipped": True}))

    def answer_to(error: BadStepError, batch: int) -> None:
        """Say what was bad; return where the run goes on behind it."""
        action = guard.action()
        size = sizes(cfg.batch)[0]
        bad_step({"step": progress.step + 1, "what": str(error), "samples": [batch * size, (batch + 1) * size],
                  "action": action})  # fmt: skip
        if action == "rewind":
            raise RewindError(batch) from None
        if action == "stop":
            samples = [list(part) for part in sample_indices(batch, data_rank, cfg, layout)]
            raise type(error)(
                f"step {progress.step + 1}, rank {rank}: {error}; this rank's sample indices: {samples}. "
                "The weights are those of the step before."
            ) from None

    def is_due() -> bool:
        every, step = cfg.eval.every, progress.step
        return step > progress.evaluated_at and step > 0 and (step == steps or bool(every and step % every == 0))

    if progress.evaluated_at < 0:
        progress.first = progress.last = evaluate().metrics
    # An evaluation that a signal interrupted; and a run that had waited long enough when it was stopped.
    going = (not is_due() or judged(progress.step == steps)) and not judge.has_enough
    while going and progress.step < steps:
        check(f"step {progress.step + 1}")
        take_step()
        going = not is_due() or judged(progress.step == steps)
        after_step(progress, not going or progress.step == steps)
    return progress
