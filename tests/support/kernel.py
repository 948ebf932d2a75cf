"""A notebook's kernel without its start: `python kernel.py -f CONNECTION_FILE`, in a process forked from the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.server import Line
from support.warm import FULL, run


def kernel(line: Line, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """An IPython kernel, to its end."""
    from ipykernel.kernelapp import launch_new_instance

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *(path for path in sys.path if "tests" not in path)]  # as a kernel of its own would have it
    from launch import notebook

    notebook.subprocess = SimpleNamespace(run=Launches())  # type: ignore[assignment]
    # matplotlib has been imported, and chosen a backend, in the server.
    launch_new_instance(argv=[*arguments, "--matplotlib=inline"])


class Launches:
    """What a notebook launches: the first by the real launcher, the others from the server."""

    cold = True

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if self.cold:
            self.cold = False
            return subprocess.run(command, capture_output=True, text=True)
        script = next(number for number, word in enumerate(command) if word.endswith("train.py"))
        port, ranks = (command[command.index(option) + 1] for option in ("--master_port", "--num_gpus"))
        return run(
            "deepspeed", int(ranks), int(port), Path(command[script]), command[script + 1 :], Path.cwd(), os.environ,
            timeout_s=240,
        )  # fmt: skip


def main() -> int:
    from support.kernel import kernel  # by a name that the server finds

    child = FULL.start(kernel, sys.argv[1:], os.getcwd(), dict(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.killpg(child.pid, signal.SIGKILL))
    code = child.wait() or 0
    return max(code, 0)


if __name__ == "__main__":
    raise SystemExit(main())
