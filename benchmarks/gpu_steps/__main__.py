"""One sub-step in a process of its own: `python -m benchmarks.gpu_steps MODULE:FUNCTION ARGUMENTS`.

It imports and prepares, says `ready`, waits for a line on its standard input and does the work. When whoever started it
is gone (the input ends), it goes too, with all that it has started.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading

from benchmarks.gpu_steps.context import Context


def _die() -> None:
    os.killpg(0, signal.SIGKILL)


def _watch() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    _die()


def main() -> None:
    call, arguments = sys.argv[1], json.loads(sys.argv[2])
    context = Context.from_environment()
    module, _, function = call.partition(":")
    work = getattr(importlib.import_module(f"benchmarks.gpu_steps.{module}"), function)(context, **arguments)
    if not os.read(0, 1024):
        return
    threading.Thread(target=_watch, daemon=True).start()
    work()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's exit: the frameworks wait for each other's threads and process groups there.
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
