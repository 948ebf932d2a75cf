"""Train a recipe: `deepspeed launch/train.py +recipe=NAME key=value …` (or under torchrun, or plain python)."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.runtime.parents  # noqa: F401 - looks who started this process, while that one is surely there
from launch.runtime.console import Terminal
from launch.runtime.interruption import EXIT_CODE, InterruptedRunError, Wishes
from launch.runtime.processes import check_port, ranks_from_environment
from launch.runtime.request import read_request, run_command
from launch.runtime.session import train

COMMAND = "launch/train.py"
OTHERS_FIRST_S = 5.0
"""What a rank that only noticed another one's end leaves that one: launchers pass on the exit code of the first that
they see, and look once a second."""


def main(argv: list[str]) -> int:
    ranks, wishes = ranks_from_environment(), Wishes()
    terminal = Terminal(ranks.first)
    try:
        with wishes.heard(to_the_end=True):
            request = read_request(argv, COMMAND)
            check_port(request.ranks)
            train(request, terminal, wishes)
    except InterruptedRunError as error:
        terminal.say(str(error))
        return EXIT_CODE if error.resumable else 1
    except Exception as error:
        from conf.errors import RequestError
        from launch.runtime.out_of_memory import DeviceMemoryError
        from launch.runtime.run_dir import DiskError
        from recipes.durable import told

        if isinstance(error, RequestError):
            raise
        if terminal.captured or not isinstance(error, OSError):
            traceback.print_exc()  # to this rank's log
        if isinstance(error, (DeviceMemoryError, DiskError)):
            if not ranks.first:  # rank 0 says the same, where it had no memory either; then this one is ended
                time.sleep(OTHERS_FIRST_S)
            mark = "error: " if isinstance(error, DiskError) else ""
            terminal.error.write(f"{mark}{error}\n")
            terminal.error.flush()
        elif _caused_by_another_rank(error):
            time.sleep(OTHERS_FIRST_S)
        elif isinstance(error, OSError) and error.filename:  # a disk's: nothing in the log explains it
            rule = f"{told(error)}; resume=auto goes on from the last checkpoint"
            terminal.error.write(f"error: rank {ranks.rank}: {rule}\n")
            terminal.error.flush()
        else:
            terminal.error.write(f"{terminal.tail()}error: rank {ranks.rank}: {type(error).__name__}: {error}\n")
            terminal.error.flush()
        # Not through the interpreter's exit: it may wait for collectives that the other ranks never join.
        os._exit(1)
    finally:
        terminal.release()
    return 0


def _caused_by_another_rank(error: Exception) -> bool:
    """Whether this rank only noticed that another one is gone: that one's message and exit code are the ones to see."""
    # Torch 2.13: gloo's, then those of the store that ranks meet in, then nccl's (ncclRemoteError, and an abort).
    signs = (
        "connection closed by peer", "connection reset by peer", "writev", "connection was likely closed",
        "broken pipe", "failed to recv", "socket closed", "remote process exit", "communicator was aborted",
    )  # fmt: skip
    return any(sign in str(error).lower() for sign in signs)


if __name__ == "__main__":
    run_command(main, answers=False)
