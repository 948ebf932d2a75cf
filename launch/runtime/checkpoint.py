"""Checkpoints as transactions: a folder of RUN_DIR/checkpoints is a whole one or it is not there.

    step_00000050/manifest.json         what it is of, every file with its size and SHA-256, and a checksum of itself
    step_00000050/rank_00000.safetensors, …

This is the side that reads; `launch/runtime/saving.py` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError
from recipes.checksums import is_sealed
from recipes.durable import SCRATCH

FORMAT = 2
MANIFEST = "manifest.json"
PREFIX = "step_"
NAME = re.compile(PREFIX + r"\d{8,}")


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
        manifest = json.loads(file.read_text(encoding="utf-8"))
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
    if not is_sealed(manifest):
        rule = "is damaged: its content is not what was written (its own checksum)"
        raise RequestError(Problem("resume", str(file), rule, "resume=auto, which takes the newest whole one"))
    return Checkpoint(folder, manifest)


def all_of(folder: Path) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The checkpoints in a folder of them, newest first; None in the place of one whose manifest cannot be read."""
    for entry in own(folder):
        try:
            found = read(entry)
        except RequestError:
            yield entry, None
        else:
            if found.step == step_of(entry):  # else a user's copy under the name of another step
                yield entry, found


def own(folder: Path) -> list[Path]:
    """What saves have published in a folder, newest first. Other names there are a user's: copies, notes, links."""
    entries = (entry for entry in folder.glob(f"{PREFIX}*") if NAME.fullmatch(entry.name))
    return sorted((entry for entry in entries if entry.is_dir() and not entry.is_symlink()), reverse=True)


def step_of(entry: Path) -> int:
    """The step of a checkpoint by the name of its folder."""
    return int(entry.name.removeprefix(PREFIX))


def unfinished(folder: Path) -> list[Path]:
    """What saves left behind that never came to their end."""
    left = sorted(folder.glob(f".{PREFIX}*{SCRATCH}"))
    return [entry for entry in left if NAME.fullmatch(entry.name[1 : -len(SCRATCH)])]


def newest(folder: Path, say: Any = lambda text: None) -> Checkpoint | None:
    """The newest whole checkpoint; `say` hears of each damaged one that is passed over."""
    for entry, found in all_of(folder):
        damage = [f"{entry / MANIFEST}: cannot be read"] if found is None else found.damage()
        if not damage:
            return found
        say(f"passed over a damaged checkpoint: {'; '.join(damage)}")
    return None
