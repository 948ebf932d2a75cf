"""Checkpoints are written beside training and published by a rename.

All ranks write beside (`.step_00000050.tmp`), to the disk, each in a thread of its own; when every rank has said that
its file is whole, rank 0 publishes and then takes old ones away. What a rename did not publish is no checkpoint, and is
swept away by the next run.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.runtime.checkpoint import FORMAT, MANIFEST, NAME, PREFIX, all_of, read, unfinished
from recipes import durable

if TYPE_CHECKING:
    from launch.runtime.engine import Engine
    from launch.runtime.snapshot import Snapshot

FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0
"""After a save that failed, the next is tried this much later; twice as long each time, up to the last."""

Receipt = dict[str, Any]
"""What a rank says of its part: {"file", "facts", "tensors"}, or {"problem"}."""


class Saving:
    """The checkpoints that a run writes, one at a time. Methods that say so are called by all ranks together."""

    def __init__(
        self, folder: Path, keep: int, keep_best: int, config: dict[str, Any], fingerprint: str,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """folder: of all checkpoints. keep: the newest ones that stay. keep_best: and the best ones by `eval.metric`.

        say: hears, on every rank, of each checkpoint that is whole, and of each that could not be written.
        """
        self.folder = folder
        self._keep, self._keep_best, self._config, self._fingerprint = keep, keep_best, config, fingerprint
        self._say = say
        self._pending: _Pending | None = None
        self._failures, self._failed_at = 0, 0.0
        self.last: int | None = None
        """The step of the last checkpoint in the folder that this run stands on: published, or resumed."""
        self.published = False
        """Whether this process has published one."""
        self.before_publishing: Callable[[], None] = lambda: None
        """Brings to the disk what a resume reads besides; rank 0. Raises OSError, and then nothing is published."""

    def sweep(self) -> None:
        """Remove what an earlier run began and never finished; rank 0, before any rank looks for checkpoints."""
        for left in unfinished(self.folder):
            durable.remove(left)
        for whole in durable.replaced(self.folder, f"{PREFIX}*"):
            if NAME.fullmatch(whole.name):  # else not ours
                durable.recover(whole)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and self._pending.thread.is_alive()

    @property
    def retry_is_due(self) -> bool:
        """Whether the last save failed, and it is time for another one."""
        wait = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** (self._failures - 1))
        return self._pending is None and self._failures > 0 and time.monotonic() - self._failed_at > wait

    def begin(self, engine: Engine, step: int, progress: dict[str, Any], value: float | None = None) -> None:
        """Take hold of the state after `step` and write it in the background; a collective call.

        Waits for an earlier save to end. value: of the metric that chooses the best checkpoints, larger is better.
        """
        from torch import distributed as dist

        from launch.runtime.snapshot import Snapshot
        from launch.runtime.state import described, facts, own_tensors

        self.finish()
        scratch = durable.beside(self.folder / f"{PREFIX}{step:08d}")
        snapshot = Snapshot(own_tensors(engine))
        head = {**self._head(engine, step, progress, dist.get_world_size()), "value": value, "state": facts(engine)}
        pending = _Pending(scratch, head, described(engine), snapshot, dist.get_rank())
        self._pending = pending
        engine.before_change = snapshot.settle
        pending.thread.start()

    def poll(self, busy_anywhere: bool) -> None:
        """Publish what is written on every rank; a collective call, with the same answer on all."""
        if self._pending is not None and not busy_anywhere:
            self.finish()

    def finish(self) -> bool:
        """Wait for the save under way and publish it; a collective call. False: it could not be written."""
        from torch import distributed as dist

        pending, self._pending = self._pending, None
        if pending is None:
            return self._failures == 0
        pending.thread.join()
        receipts = _agreed(pending.receipt)
        problems = [f"rank {number}: {said['problem']}" for number, said in enumerate(receipts) if "problem" in said]
        step = int(pending.head["step"])
        answer: Receipt = {}
        if dist.get_rank() == 0:
            answer = {"problem": problems[0]} if problems else _attempt(lambda: self._publish(pending, receipts))
            if "problem" in answer:
                durable.remove(pending.scratch)
        problem = _agreed(answer)[0].get("problem")
        if problem:
            self._failures, self._failed_at = self._failures + 1, time.monotonic()
            self._say(f"step {step}: no checkpoint: {problem}")
        else:
            self._failures, self.last, self.published = 0, step, True
            self._say(f"step {step}: checkpoint")
        return problem is None

    def _head(self, engine: Engine, step: int, progress: dict[str, Any], world: int) -> dict[str, Any]:
        layout = engine.layout
        return {
            "format": FORMAT, "step": step, "written": datetime.datetime.now(datetime.UTC).isoformat(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
            "layout": {axis: getattr(layout, axis) for axis in ("data", "tensor", "pipeline", "sequence", "stages")},
            "world": world, "zero": self._config["zero"]["stage"], "config": self._config,
            "data": self._fingerprint, "progress": progress,
        }  # fmt: skip

    def _publish(self, pending: _Pending, receipts: list[Receipt]) -> None:
        from recipes.checksums import seal

        tensors: dict[str, Any] = {}
        for receipt in receipts:
            tensors |= receipt["tensors"]
        files = {receipt["file"]: receipt["facts"] for receipt in receipts}
        manifest = seal({**pending.head, "tensors": tensors, "files": files})
        durable.replace_text(pending.scratch / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
        for name, fact in files.items():
            if (pending.scratch / name).stat().st_size != fact["bytes"]:
                raise OSError(0, "is not whole on this machine: all machines need one run_dir", name)
        self.before_publishing()
        target = self.folder / pending.scratch.stem[1:]
        durable.publish(pending.scratch, target)
        self._prune(target)

    def _prune(self, newest: Path) -> None:
        there = [entry for entry, _ in all_of(self.folder)]
        # Later ones are damaged, or of a future that was given up when an earlier one was resumed.
        later = there[: there.index(newest)]
        earlier = there[len(later) :]
        best: list[Path] = []
        if self._keep_best:
            metric = self._config["eval"]["metric"]
            valued = [(value, entry) for entry in earlier if (value := _value(entry, metric)) is not None]
            best = [entry for _, entry in sorted(valued, reverse=True)[: self._keep_best]]
        for old in [*later, *(entry for entry in earlier[self._keep :] if entry not in best)]:
            durable.remove(old)


class _Pending:
    """A save that is under way on this rank."""

    def __init__(
        self, scratch: Path, head: dict[str, Any], described: dict[str, Any], snapshot: Snapshot, rank: int
    ):  # fmt: skip
        self.scratch, self.head, self.receipt = scratch, head, Receipt()
        self._described, self._snapshot, self._rank = described, snapshot, rank
        self.thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)

    def _work(self) -> None:
        try:
            self.receipt = _attempt(self._write)
        except BaseException as error:  # on another thread nobody would hear of it
            self.receipt = {"problem": f"{type(error).__name__}: {error}"}
        finally:
            self._snapshot.release()

    def _write(self) -> Receipt:
        from launch.runtime.tensor_file import digest_of, write_tensors

        durable.make_folder(self.scratch)
        file = self.scratch / f"rank_{self._rank:05d}.safetensors"
        digest = write_tensors(file, self._snapshot.described, self._snapshot.values())
        if digest_of(file) != digest:
            raise OSError(0, "what was read back is not what was written", str(file))
        facts = {"bytes": file.stat().st_size, "sha256": digest}
        return {"file": file.name, "facts": facts, "tensors": self._described}


def _attempt(action: Callable[[], Receipt | None]) -> Receipt:
    try:
        return action() or {}
    except OSError as error:
        return {"problem": durable.told(error)}


def _agreed(mine: Receipt) -> list[Receipt]:
    """What every rank says, on all of them."""
    from torch import distributed as dist

    answers: list[Receipt] = [{}] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


def _value(entry: Path, metric: str) -> float | None:
    from conf.errors import RequestError

    try:
        manifest = read(entry).manifest
    except RequestError:
        return None
    return manifest.get("value") if manifest["config"]["eval"]["metric"] == metric else None
