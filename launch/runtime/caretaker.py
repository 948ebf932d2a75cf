"""What happens between the steps of a run: wishes of signals, checkpoints, a look at the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import CheckpointConfig
from launch.runtime.interruption import InterruptedRunError, Wishes
from launch.runtime.saving import Saving

if TYPE_CHECKING:
    from launch.runtime.engine import Engine
    from launch.runtime.loop import Progress


class StopAsked(Exception):
    """A signal asked this run to stop; all ranks raise it at the same place."""


class Caretaker:
    """All methods are called by all ranks together."""

    def __init__(
        self, engine: Engine, saving: Saving, wishes: Wishes, cfg: CheckpointConfig, steps: int, savable: bool,
        best_is: str | None, beat: Callable[[str], None] = lambda what: None,
    ):  # fmt: skip
        """savable: whether the state can be resumed. best_is: max or min of `eval.metric`. beat: the run goes on."""
        self._engine, self._saving, self._wishes, self._cfg, self._steps = engine, saving, wishes, cfg, steps
        self._savable, self._best_is, self._beat = savable, best_is, beat
        self._wanted = False
        self._saved_at = time.monotonic()

    def look(self, what: str) -> None:
        """Between two parts of the work: agree on what is to be done. Raises StopAsked where a signal asked for it."""
        self._beat(what)
        minutes = self._cfg.minutes
        due = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        wishes, saving = self._wishes, self._saving
        asked, wishes.save = wishes.save, False  # what is asked from here on is for the next look
        stop, save, busy = self._engine.any_of(wishes.stop, asked or due or saving.retry_is_due, saving.busy)
        self._wanted = self._wanted or (save and self._savable)
        saving.poll(busy)
        if stop:
            raise StopAsked

    def after_step(self, progress: Progress, last: bool) -> None:
        """Save where a checkpoint is due."""
        every = self._cfg.every
        regular = bool(every) and progress.step % every == 0
        if regular or self._wanted or (last and (every or self._cfg.minutes is not None)):
            self.save(progress)

    def close(self) -> None:
        """Wait for a save under way."""
        self._saving.finish()

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint."""
        self._wanted, self._saved_at = False, time.monotonic()
        value = progress.value if progress.evaluated_at == progress.step else None
        if value is not None and self._best_is == "min":
            value = -value
        self._saving.begin(self._engine, progress.step, asdict(progress), value)

    def stop(self, progress: Progress) -> InterruptedRunError:
        """Save what is not saved yet, and say how the run stands."""
        saved = self._saving.finish()
        if self._saving.last != progress.step:
            saved = self._savable
            if saved:
                self.save(progress)
                saved = self._saving.finish()
        where = f"stopped after step {progress.step} of {self._steps}"
        if saved:
            return InterruptedRunError(f"{where}, resume=auto continues from there")
        return InterruptedRunError(f"{where}, without a checkpoint of it", self._saving.last is not None)


def too_late(folder: Path, grace_s: float, say: Callable[[str], None]) -> int:
    """The end of a run that did not stop in time. Returns its exit code: whether there is something to resume."""
    from launch.runtime.checkpoint import all_of
    from launch.runtime.interruption import EXIT_CODE

    newest = next((entry for entry, found in all_of(folder) if found is not None), None)
    where = f"resume=auto continues from {newest}" if newest else "there is no checkpoint yet"
    say(f"not stopped within {grace_s:g} s (checkpoint.grace_s): {where}")
    return EXIT_CODE if newest else 1
