"""A notebook's kernel without its start: `python kernel.py -f CONNECTION_FILE`, in a process forked from the server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.server import Line
from support.warm import FULL


def kernel(line: Line, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """An IPython kernel, to its end."""
    from ipykernel.kernelapp import launch_new_instance

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *(path for path in sys.path if "tests" not in path)]  # as a kernel of its own would have it
    # matplotlib has been imported, and chosen a backend, in the server.
    launch_new_instance(argv=[*arguments, "--matplotlib=inline"])


def main() -> int:
    from support.kernel import kernel  # by a name that the server finds

    child = FULL.start(kernel, sys.argv[1:], os.getcwd(), dict(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.killpg(child.pid, signal.SIGKILL))
    code = child.wait() or 0
    return max(code, 0)


if __name__ == "__main__":
    raise SystemExit(main())
