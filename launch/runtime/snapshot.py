"""The training state at one moment, read while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import torch

from launch.runtime.fragments import MASTER


class Snapshot:
    """Tensors that one thread reads in order while another trains with them.

    Between two updates nothing changes weights or optimizer, so the reader needs no copy of them; the update waits
    (`settle`) until what is left to read fits into as much memory as this rank's parameters take, and copies that.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        """tensors: `NAME|KIND|…` → values; what forward passes change (buffers, generators) is copied here."""
        self._names = list(tensors)
        self._tensors = [value if _waits(name) else value.detach().clone() for name, value in tensors.items()]
        self.described = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
        self._budget = sum(value.nbytes for name, value in tensors.items() if _kind(name) == MASTER)
        self._at = 0
        self._changed = threading.Condition()
        self._over = self._settled = False

    def values(self) -> Iterator[torch.Tensor]:
        """Each tensor in turn; it is read before the next one is asked for."""
        for place in range(len(self._tensors)):
            with self._changed:
                value = self._tensors[place]
            yield value
            with self._changed:
                self._at = place + 1
                self._tensors[place] = torch.empty(0)
                self._changed.notify_all()

    def release(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._over = True
            self._tensors.clear()
            self._changed.notify_all()

    def settle(self) -> None:
        """Return when the tensors may change. Called by the training thread before each update."""
        if self._settled:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._left() <= self._budget)
            being_read = self._at
            for place in range(being_read + 1, len(self._tensors)):
                if _waits(self._names[place]):
                    self._tensors[place] = self._tensors[place].detach().to("cpu", copy=True)
            self._changed.wait_for(lambda: self._over or self._at > being_read)
            self._settled = True

    def _left(self) -> int:
        """Bytes behind the tensor that is being read, without those that are copies already."""
        rest = zip(self._names[self._at + 1 :], self._tensors[self._at + 1 :], strict=True)
        return sum(value.nbytes for name, value in rest if _waits(name))


def _kind(name: str) -> str:
    return name.rsplit("|", 3)[1]


def _waits(name: str) -> bool:
    """Whether a tensor stays as it is until the next update."""
    from launch.runtime.state import BUFFER, RNG

    owner, kind = name.rsplit("|", 3)[:2]
    return owner != RNG and kind != BUFFER
