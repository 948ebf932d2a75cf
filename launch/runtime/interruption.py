"""Signals that stop a run (SIGTERM, Ctrl-C, the SIGHUP of a terminal that goes away), or ask it for a checkpoint.

A step is finished, a checkpoint written, and the exit code says resume me. docs/signals.md has what each signal does
in each phase.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes import durable

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (*STOPPING, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run stopped before its end, and `resume=auto` continues it."""
TOGETHER_S = 2.0
"""A terminal's Ctrl-C reaches the ranks once by itself and once through the launcher, as a SIGTERM."""
EARLY_S = 2.0
"""Before the first step nothing has to be kept: what a main thread that waits outside of Python is left."""

temporary: set[Path] = set()
"""Files of this process that nothing else removes where it is ended here (logs in another run's folder, perhaps)."""
BEFORE_THE_FIRST_STEP = "stopped before the first step of this start"


class InterruptedRunError(RuntimeError):
    """The run stopped at a signal. resumable: nothing is lost, or nothing behind the last whole checkpoint."""

    def __init__(self, text: str, resumable: bool = True):
        super().__init__(text)
        self.resumable = resumable


class StoppedEarly(BaseException):
    """A signal's handler raises it before the first step, wherever the main thread is.

    No Exception: libraries that go on after any error of their own would go on after this one.
    """


def _nothing_is_lost() -> int:
    return EXIT_CODE


class Wishes:
    """What signals asked of this process.

    A second Ctrl-C, later, is obeyed at once. A second SIGTERM is the launcher's, when another rank has ended.
    """

    def __init__(self, grace_s: float = 25.0, too_late: Callable[[], int] = _nothing_is_lost):
        """too_late: called `grace_s` seconds after the wish to stop, from another thread; the process's exit code."""
        self.stop = self.save = False
        self._looked_at = False
        self._asked = 0.0
        self.limit(grace_s, too_late)

    def limit(self, grace_s: float, too_late: Callable[[], int]) -> None:
        """As above, once the configuration is known."""
        self._grace_s, self._too_late = grace_s, too_late

    def __call__(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self._asked = True, time.monotonic()
            if not self._looked_at:
                raise StoppedEarly
        elif number == signal.SIGINT and time.monotonic() - self._asked > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def look_later(self) -> None:
        """From now on wishes are looked at between steps; until here a wish to stop is an exception at once."""
        self._looked_at = True

    @contextmanager
    def heard(self, to_the_end: bool = False) -> Iterator[None]:
        """Signals are wishes inside the block; outside the main thread (a server's notebook) nothing changes.

        to_the_end: of this process. When the block has ended well or has stopped, its exit code stands, and no signal
        changes it while the interpreter takes its leave. Inside another such block this one does nothing.
        """
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is self:
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
        decided = False
        try:
            yield
            decided = True
        except InterruptedRunError:
            decided = True
            raise
        except (Exception, StoppedEarly) as error:
            # Torch turns what a handler raises inside a rendezvous into an error of its own; a compiler that had the
            # same Ctrl-C has failed.
            if self.stop and not self._looked_at:
                decided = True
                raise InterruptedRunError(BEFORE_THE_FIRST_STEP) from error
            raise
        finally:
            self._looked_at = True  # no exception out of a handler from here on
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if decided and to_the_end else handler)
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
        began = time.monotonic()
        while True:
            # A handler that has run has its exception on the way, or the steps will see what it noted.
            early = not self._looked_at and not self.stop
            if (left := began + (EARLY_S if early else self._grace_s) - time.monotonic()) <= 0:
                break
            numbers.settimeout(min(left, EARLY_S))
            try:
                if not numbers.recv(64):
                    return
            except TimeoutError:
                continue
        code = self._too_late() if self._looked_at else EXIT_CODE
        for file in temporary:
            durable.remove(file)
        os._exit(code)
