"""SIGTERM and Ctrl-C during training: the step is finished, a checkpoint written, and the exit code says resume me."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run stopped before its end, and `resume=auto` continues it."""
TOGETHER_S = 2.0
"""A terminal's Ctrl-C reaches the ranks once by itself and once through the launcher, as a SIGTERM."""


class InterruptedRunError(RuntimeError):
    """The run stopped at a signal. saved: behind a checkpoint."""

    def __init__(self, step: int, steps: int, saved: bool):
        how = "resume=auto continues from there" if saved else "without a checkpoint of it"
        super().__init__(f"stopped after step {step} of {steps}, {how}")
        self.saved = saved


class Wishes:
    """What signals asked of this process. Who asks again, later, to stop is obeyed at once."""

    def __init__(self) -> None:
        self.stop = self.save = False
        self._asked = 0.0

    def __call__(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self._asked = True, time.monotonic()
        elif time.monotonic() - self._asked > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are wishes inside the block; outside the main thread (a server's notebook) nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
