"""Checksums of what is written, so that a byte that changed is noticed wherever it is. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from conf.errors import Problem, RequestError
from recipes.durable import replace_text

SEAL = "checksum"
SUMS = "SHA256SUMS"
"""Of an exported model, in the format of `sha256sum --check`."""
BLOCK = 1 << 20


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """JSON values with a checksum of their own among them."""
    return {**manifest, SEAL: _digest(json.loads(json.dumps(manifest)))}


def is_sealed(manifest: Any) -> bool:
    """Whether what was read from JSON is what `seal` gave."""
    if not isinstance(manifest, dict) or SEAL not in manifest:
        return False
    return manifest[SEAL] == _digest({name: value for name, value in manifest.items() if name != SEAL})


def crc32_of(path: Path) -> int:
    """CRC-32 of a file: some gigabytes a second, for what is read at every start."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files of a folder, folders below included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    replace_text(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Compare a model's files with its SHA256SUMS, where it has one; one rank of each machine does.

    Raises RequestError (model.path) for a file that is not what was written, or is gone.
    """
    file = folder / SUMS
    if not file.is_file() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    wrong = []
    for number, line in enumerate(file.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        path = folder / name
        if len(digest) < 64 or gap != "  " or not name or "\0" in name:
            wrong.append(f"line {number} of {SUMS}")
        elif not path.is_file() or _sha256(path) != digest:
            wrong.append(name)
    if wrong:
        rule = f"not what was written, by its {SUMS}: {', '.join(wrong[:3])}" + " …" * (len(wrong) > 3)
        nearest = f"export it again (python launch/checkpoints.py), or remove {file} if you changed it yourself"
        raise RequestError(Problem("model.path", str(folder), rule, nearest))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
