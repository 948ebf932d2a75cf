"""Which steps are bad, and what is done about them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from conf.schema import FaultsConfig

if TYPE_CHECKING:
    from launch.runtime.engine import StepResult
    from launch.runtime.loop import Progress

WINDOW = 20
"""Good steps that a spike is measured against."""
LEAST = 5
"""Good steps before anything is called a spike."""


class Guard:
    """The same on all ranks: it sees losses and norms of the whole global batch alone."""

    def __init__(self, cfg: FaultsConfig, progress: Progress):
        self._cfg, self._progress = cfg, progress
        self._in_a_row = 0

    def verdict(self, loss: float | None, norm: float | None) -> str | None:
        """What is wrong with a finite loss or norm: it is `faults.spike` times the median of the latest good ones."""
        recent = self._progress.recent
        if self._cfg.spike is None or len(recent) < LEAST:
            return None
        for what, value, place in (("loss", loss, 0), ("gradient norm", norm, 1)):
            if value is None:
                continue
            usual = statistics.median(row[place] for row in recent)
            if usual > 0 and value > self._cfg.spike * usual:
                return f"{what} is {value:.4g}, {value / usual:.1f} times its median of the last {len(recent)} steps"
        return None

    def saw(self, result: StepResult) -> None:
        """A good step."""
        self._in_a_row = 0
        if self._cfg.spike is not None and result.applied:
            self._progress.recent[:] = [*self._progress.recent, [result.loss, result.grad_norm or 0.0]][-WINDOW:]

    def action(self) -> str:
        """What to do about a bad step: `faults.on_bad_step`, and stop when too many follow each other."""
        self._in_a_row += 1
        bad = max(self._in_a_row, len(self._progress.passed_over) + 1 if self._cfg.on_bad_step == "rewind" else 0)
        return "stop" if bad > self._cfg.bad_steps else self._cfg.on_bad_step
