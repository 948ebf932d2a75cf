"""safetensors files that are written one tensor at a time: the library's own writer wants all of them at once."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from recipes import durable

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


def write_tensors(
    path: Path, described: Mapping[str, tuple[torch.dtype, Sequence[int]]], values: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Write `values` to a safetensors file, in order, to the disk; returns its SHA-256.

    described: name → (dtype, shape) of each value. Of what is not on the host, one tensor at a time is copied there.
    Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in described.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with durable.new_file(path) as file:
        for part in _parts(len(text).to_bytes(8, "little") + text, values):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _parts(head: bytes, values: Iterable[torch.Tensor]) -> Iterable[Any]:
    yield head
    for value in values:
        if value.numel():
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """A safetensors file, open to read tensors from. Raises OSError, or SafetensorError where it is none."""
    try:
        content = safe_open(path, framework="pt")
    except RuntimeError as error:  # torch maps the file, and this is how it says what the system said
        code = re.search(r"\((\d+)\)$", str(error))
        number = int(code.group(1)) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None
    except OSError as error:  # of safetensors, for which every file that cannot be opened is one that is not there
        os.close(os.open(path, os.O_RDONLY))
        raise OSError(errno.EIO, "cannot be opened", str(path)) from error
    with content as tensors:
        yield tensors


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
