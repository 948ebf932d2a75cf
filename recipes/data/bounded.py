"""Work of which a stranger's file decides how long it takes and how much memory it needs, done where it can be ended.

A chat template is a program: loops in loops run for days, `'x' * 10**10` is one operation that nothing in Python can
interrupt, and compilers of templates fold constants. So it runs in a forked process, which the kernel ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

SECONDS = 5.0
"""Processor time of one step: a machine that is busy with other things makes none too slow."""
MEMORY = 1 << 30
"""Bytes beyond what the process has already."""
Item = TypeVar("Item")
_inside = False


class BoundError(Exception):
    """The work on one item was ended. number: of the item."""

    def __init__(self, number: int, rule: str):
        super().__init__(rule)
        self.number = number


def bounded(work: Callable[[Item], Any], items: Sequence[Item]) -> Iterator[Any]:
    """`work` of each item, in order, done by a process that has a copy of all that is here.

    Results are JSON values, and what `work` changes elsewhere is lost. Raises BoundError where an item takes more than
    SECONDS from its beginning, or from the last `step`; what needs more than MEMORY raises MemoryError in `work`.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # of threads, which are not there in the new process; none of them is waited for
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(reader)
        _work(work, items, writer)
    os.close(writer)
    count, status = 0, None
    try:
        with os.fdopen(reader, "rb") as pipe:
            while count < len(items):
                line = pipe.readline()
                if not line.endswith(b"\n"):  # it has been ended
                    status = os.waitpid(child, 0)[1]
                    raise BoundError(count, _reason(status))
                count += 1
                yield json.loads(line)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def step() -> None:
    """Begin with the time of `bounded` anew; nothing elsewhere."""
    if _inside:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _work(work: Callable[[Item], Any], items: Sequence[Item], writer: int) -> None:
    """Write what is found of each item, and never return."""
    global _inside
    try:
        _inside = True
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPROF, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with os.fdopen(writer, "wb") as pipe:
            for item in items:
                step()
                pipe.write(json.dumps(work(item)).encode() + b"\n")
                pipe.flush()
    except BrokenPipeError:  # nobody waits any more
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _limit_memory() -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:  # macOS, which has no such limit either
        return
    limit = pages * resource.getpagesize() + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _reason(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"ends its process, with exit code {os.waitstatus_to_exitcode(status)}"
    if os.WTERMSIG(status) == signal.SIGPROF:
        return f"takes more than {SECONDS:g} s"
    return f"ends its process, by {signal.Signals(os.WTERMSIG(status)).name}"
