"""gpu.jsonl: a row of facts for each start, rows of figures, and a closing row for each sub-step.

A row is one write of one line, synchronised: whatever ends the benchmark, what was measured is there.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, commit, processor
from recipes.durable import append_lines, synchronise

Row = dict[str, Any]
PACKAGES = ("torch", "deepspeed", "transformers", "triton", "accelerate", "numpy", "liger-kernel", "flash-attn")
SAME = ("commit", "files", "device", "size")
"""Facts that make two starts one measurement."""


def append(file: Path, row: Row) -> None:
    """Add one row; on the disk when this returns."""
    append_lines(file, json.dumps(row, ensure_ascii=False, default=str) + "\n")
    synchronise(file)


def read(file: Path) -> list[Row]:
    """All whole rows; one that was cut off is left out."""
    rows = []
    for line in file.read_text(errors="replace", encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def facts(device: str, size: str, command: str) -> Row:
    """The first row of a start: what is measured, on what."""
    try:
        revision = commit().strip()
    except OSError:  # no git
        revision = ""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "step": "", "name": "facts", "commit": revision or "unknown", "files": _digest(),
        "device": _gpu() if device == "cuda" else processor(), "kind": device, "processor": processor(), "size": size,
        "versions": versions, "system": platform.platform(), "date": str(datetime.date.today()), "command": command,
    }  # fmt: skip


def _digest() -> str:
    """Of all that runs: a commit "with changes" says nothing of what they are."""
    known = hashlib.sha256()
    for folder in ("benchmarks", "conf", "launch", "recipes"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".yaml", ".json"):
                known.update(file.read_bytes())
    return known.hexdigest()[:12]


def _gpu() -> str:
    """Name of the first visible GPU."""
    if shutil.which("nvidia-smi") is None:
        return "cuda"
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, encoding="utf-8", errors="replace", timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "cuda"
    return (answer.splitlines() or ["cuda"])[0].strip()


@dataclass
class Start:
    """What was measured under the same facts."""

    facts: Row
    parts: dict[str, list[Row]] = field(default_factory=dict)
    """Sub-step → its rows of figures, those of its last try."""
    closed: dict[str, Row] = field(default_factory=dict)
    """Sub-step → its closing row."""

    def done(self) -> set[str]:
        return {key for key, row in self.closed.items() if row.get("ok")}

    def of(self, step: str) -> list[Row]:
        """All figures of a step."""
        return [row for rows in self.parts.values() for row in rows if row["step"] == step]


def starts(rows: list[Row]) -> list[Start]:
    """The rows by their facts, the oldest first."""
    found: dict[str, Start] = {}
    current: Start | None = None
    for row in rows:
        if row.get("name") == "facts":
            key = json.dumps([row.get(name) for name in SAME])
            current = found.setdefault(key, Start(row))
        elif current is not None and "step" in row and "name" in row:
            key = f"{row['step']}.{row['name']}"
            if "seconds_in_all" in row:
                current.closed[key] = row
            else:
                if key in current.closed:  # another try begins
                    del current.closed[key], current.parts[key]
                current.parts.setdefault(key, []).append(row)
    return list(found.values())
