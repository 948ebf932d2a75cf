"""Signals that stop a run (SIGTERM, Ctrl-C, the SIGHUP of a terminal that goes away), or ask it for a checkpoint.

A step is finished, a checkpoint written, and the exit code says resume me.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (*STOPPING, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run stopped before its end, and `resume=auto` continues it."""
TOGETHER_S = 2.0
"""A terminal's Ctrl-C reaches the ranks once by itself and once through the launcher, as a SIGTERM."""


BEFORE_THE_FIRST_STEP = "stopped before the first step of this start"


class InterruptedRunError(RuntimeError):
    """The run stopped at a signal. resumable: nothing is lost, or nothing behind the last whole checkpoint."""

    def __init__(self, text: str, resumable: bool = True):
        super().__init__(text)
        self.resumable = resumable


class Wishes:
    """What signals asked of this process.

    A second Ctrl-C, later, is obeyed at once. A second SIGTERM is the launcher's, when another rank has ended.
    """

    def __init__(self, grace_s: float, too_late: Callable[[], int]):
        """too_late: called `grace_s` seconds after the wish to stop, from another thread; the process's exit code."""
        self.stop = self.save = False
        self._looked_at = False
        self._grace_s, self._too_late = grace_s, too_late
        self._asked = 0.0

    def __call__(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self._asked = True, time.monotonic()
            if not self._looked_at:
                raise InterruptedRunError(BEFORE_THE_FIRST_STEP)
        elif number == signal.SIGINT and time.monotonic() - self._asked > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def look_later(self) -> None:
        """From now on wishes are looked at between steps; until here a wish to stop is an exception at once."""
        self._looked_at = True

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are wishes inside the block; outside the main thread (a server's notebook) nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Python runs handlers between two instructions of the main thread, which may hang in a collective call. The
        # number of a signal is written here at once.
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        deadline = threading.Thread(target=self._wait, args=(ours,), name="deadline", daemon=True)
        deadline.start()
        heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self) for number in heard}
        try:
            yield
        except Exception as error:
            # Torch turns what a handler raises inside a rendezvous into an error of its own.
            if self.stop and not self._looked_at and not isinstance(error, InterruptedRunError):
                raise InterruptedRunError(BEFORE_THE_FIRST_STEP) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            theirs.close()  # ends the thread
            deadline.join()
            ours.close()

    def _wait(self, numbers: socket.socket) -> None:
        """Let the deadline of a wish to stop pass, unless the block ends before."""
        while received := numbers.recv(1):
            if received[0] in STOPPING:
                break
        else:
            return
        end = time.monotonic() + self._grace_s
        while (left := end - time.monotonic()) > 0:
            numbers.settimeout(left)
            try:
                if not numbers.recv(64):
                    return
            except TimeoutError:
                break
        os._exit(self._too_late())
