"""Whether the launcher that started this rank is still there: ranks do not outlive it."""

from __future__ import annotations

import os

import psutil

LAUNCHED = "LOCAL_RANK" in os.environ
"""By a launcher (deepspeed, torchrun); who starts plain python may well be gone before the run is over."""
STARTED_BY = os.getppid()
SUPERVISOR = "DEEPSPEED_RECIPES_SUPERVISOR"
"""In the environment of what `launch/supervise.py` starts: its process id."""


class Launcher:
    """The processes above this rank that belong to the launcher."""

    def __init__(self, started_by: int = STARTED_BY):
        """started_by: the parent, as it was when this process was young."""
        self._pids = [os.getpid(), started_by]
        try:
            parent = psutil.Process(started_by)
            # `deepspeed` starts `launcher.launch`, which starts the ranks.
            if any("deepspeed.launcher.launch" in word for word in parent.cmdline()):
                self._pids.append(parent.ppid())
                if (supervisor := os.environ.get(SUPERVISOR, "")).isdigit():
                    self._pids.append(int(supervisor))
        except psutil.Error:  # gone already, or not ours to look at
            pass

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        for child, parent in zip(self._pids, self._pids[1:], strict=False):
            try:
                if psutil.Process(child).ppid() != parent:
                    return True
            except psutil.Error:
                return True
        return False
