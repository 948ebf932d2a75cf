"""Checkpoints as transactions: a folder of RUN_DIR/checkpoints is a whole one or it is not there.

    step_00000050/manifest.json         what it is of, and every file with its size and SHA-256
    step_00000050/rank_00000.safetensors, …

All ranks write beside (`.step_00000050.tmp`), to the disk; rank 0 publishes by a rename once every rank has said that
its file is whole, and then takes old ones away. What a rename did not publish is no checkpoint, and is swept away.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError

if TYPE_CHECKING:
    from launch.runtime.engine import Engine

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. manifest: the content of its manifest.json."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in self.manifest["files"]]

    def damage(self) -> list[str]:
        """What is wrong with its files, each named; reads all of them."""
        from launch.runtime.tensor_file import digest_of

        found = []
        for name, facts in self.manifest["files"].items():
            file = self.folder / name
            try:
                size = file.stat().st_size
                if size != facts["bytes"]:
                    found.append(f"{file}: {size} bytes, {facts['bytes']} were written")
                elif digest_of(file) != facts["sha256"]:
                    found.append(f"{file}: its content is not what was written (SHA-256)")
            except OSError as error:
                found.append(f"{file}: {error.strerror}")
        return found


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises RequestError (resume) where there is none, or its manifest is damaged."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        known = manifest["format"]
        int(manifest["step"]), manifest["files"], manifest["tensors"], manifest["layout"], manifest["config"]
    except FileNotFoundError:
        rule = f"no checkpoint there (it has no {MANIFEST})"
        raise RequestError(Problem("resume", str(folder), rule, "resume=RUN_DIR, or resume=auto")) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(Problem("resume", str(file), f"is damaged ({type(error).__name__}: {error})")) from None
    if known != FORMAT:
        rule = f"of format {known}, this version reads {FORMAT}"
        raise RequestError(Problem("resume", str(folder), rule, "the version that wrote it"))
    return Checkpoint(folder, manifest)


def all_of(folder: Path) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The checkpoints in a folder of them, newest first; None in the place of one whose manifest cannot be read."""
    for entry in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            yield entry, read(entry)
        except RequestError:
            yield entry, None


def unfinished(folder: Path) -> list[Path]:
    """What saves left behind that never came to their end."""
    return sorted(folder.glob(f".{PREFIX}*.tmp"))


def newest(folder: Path, say: Any = lambda text: None) -> Checkpoint | None:
    """The newest whole checkpoint; `say` hears of each damaged one that is passed over."""
    for entry, found in all_of(folder):
        damage = [f"{entry / MANIFEST}: cannot be read"] if found is None else found.damage()
        if not damage:
            return found
        say(f"passed over a damaged checkpoint: {'; '.join(damage)}")
    return None


class Checkpoints:
    """Those of a run. All methods are called by all ranks together."""

    def __init__(self, run_dir: Path, keep: int, config: dict[str, Any], fingerprint: str):
        self.folder = run_dir / "checkpoints"
        self._keep, self._config, self._fingerprint = keep, config, fingerprint

    def save(self, engine: Engine, step: int, progress: dict[str, Any]) -> str | None:
        """Write the state after `step` and publish it. Returns what went wrong, on all ranks; training may go on.

        What is there already, is kept until the new one is whole.
        """
        from torch import distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()
        target = self.folder / f"{PREFIX}{step:08d}"
        scratch = target.with_name(f".{target.name}.tmp")
        receipt = self._attempt(lambda: self._begin(scratch)) if rank == 0 else {}
        receipt = self._agreed(receipt)[0]
        if "problem" not in receipt:
            receipt = self._attempt(lambda: self._write(engine, scratch, rank))
        receipts = self._agreed(receipt)
        problems = [f"rank {number}: {said['problem']}" for number, said in enumerate(receipts) if "problem" in said]
        if not problems and rank == 0:
            manifest = self._manifest(engine, step, progress, receipts, world)
            problems = [
                p for p in [self._attempt(lambda: self._publish(scratch, target, manifest)).get("problem")] if p
            ]
        problem = self._agreed({"problem": problems[0]} if problems else {})[0].get("problem")
        if problem and rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        return problem

    @staticmethod
    def _attempt(action: Any) -> dict[str, Any]:
        try:
            return action() or {}
        except OSError as error:
            return {"problem": f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")}

    @staticmethod
    def _agreed(mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, on all of them."""
        from torch import distributed as dist

        answers: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(answers, mine)
        return answers

    def _begin(self, scratch: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        for left in unfinished(self.folder):
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()

    @staticmethod
    def _write(engine: Engine, scratch: Path, rank: int) -> dict[str, Any]:
        from launch.runtime.state import described, own_tensors
        from launch.runtime.tensor_file import digest_of, write_tensors

        file = scratch / f"rank_{rank:05d}.safetensors"
        digest = write_tensors(file, own_tensors(engine))
        if digest_of(file) != digest:
            raise OSError(0, "what was read back is not what was written", str(file))
        facts = {"bytes": file.stat().st_size, "sha256": digest}
        return {"file": file.name, "facts": facts, "tensors": described(engine)}

    def _manifest(
        self, engine: Engine, step: int, progress: dict[str, Any], receipts: list[dict[str, Any]], world: int
    ) -> dict[str, Any]:
        from launch.runtime.state import facts

        tensors: dict[str, Any] = {}
        for receipt in receipts:
            tensors |= receipt["tensors"]
        layout = engine.layout
        return {
            "format": FORMAT, "step": step, "written": datetime.datetime.now(datetime.UTC).isoformat(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
            "layout": {axis: getattr(layout, axis) for axis in ("data", "tensor", "pipeline", "sequence", "stages")},
            "world": world, "zero": self._config["zero"]["stage"], "config": self._config,
            "data": self._fingerprint, "state": facts(engine), "progress": progress, "tensors": tensors,
            "files": {receipt["file"]: receipt["facts"] for receipt in receipts},
        }  # fmt: skip

    def _publish(self, scratch: Path, target: Path, manifest: dict[str, Any]) -> None:
        from recipes.data.store import synchronise

        with (scratch / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        synchronise(scratch)
        if target.exists():  # the same step again, after a resume from before it
            shutil.rmtree(target)
        scratch.rename(target)
        synchronise(self.folder)
        there = sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)
        # Later ones are damaged, or of a future that was given up when an earlier one was resumed.
        later = there[: there.index(target)]
        for old in [*later, *there[len(later) + self._keep :]]:
            shutil.rmtree(old, ignore_errors=True)
