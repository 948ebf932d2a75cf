"""safetensors files that are written one tensor at a time: the library's own writer wants all of them at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16",
}  # fmt: skip


def write_tensors(
    path: Path, described: Mapping[str, tuple[torch.dtype, Sequence[int]]], values: Iterable[torch.Tensor]
) -> str:
    """Write `values` to a safetensors file, in order, to the disk; returns its SHA-256.

    described: name → (dtype, shape) of each value. Of what is not on the host, one tensor at a time is copied there.
    Raises OSError.
    """
    header: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in described.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _parts(len(text).to_bytes(8, "little") + text, values):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(head: bytes, values: Iterable[torch.Tensor]) -> Iterable[Any]:
    yield head
    for value in values:
        if value.numel():
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
