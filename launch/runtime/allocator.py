"""glibc's allocator on CPUs: give memory back while a model is built, keep it while one is trained."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameter numbers of glibc's mallopt(3)."""
MMAP_MAX = 65536
"""glibc's own default of M_MMAP_MAX."""


def _mallopt(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)


@contextmanager
def memory_goes_back() -> Iterator[None]:
    """Freed blocks of 64 KiB and more return to the system at once.

    glibc raises its mmap threshold to the size of what is freed (up to 32 MiB), so that whole layers come to lie on the
    heap, and the small shards that stay between them keep all of it resident: four ranks that each hold a quarter of a
    model showed the whole of it. Only while building: in training, page faults would cost more than they save.
    """
    _mallopt(M_MMAP_MAX, MMAP_MAX)  # a run before this one, in a notebook, may have kept it
    _mallopt(M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        _mallopt(M_MMAP_THRESHOLD, 2**25)


def memory_stays() -> None:
    """Freed blocks stay with the process, whatever their size.

    Training on a CPU frees and takes the same large activations in every micro-batch. glibc maps blocks over 32 MiB
    anew each time and returns the top of the heap, and the kernel zeroes every page again: tens of thousands of page
    faults per step, some per cent of the step.
    """
    _mallopt(M_MMAP_MAX, 0)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
