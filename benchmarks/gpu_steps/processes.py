"""Processes of sub-steps: started early for their imports, given their turn, ended with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.gpu_steps.catalogue import SubStep
from benchmarks.gpu_steps.context import Context
from benchmarks.report import ROOT

ERROR_CHARACTERS = 1500
LOG_BYTES, LOG_SHARE = 8 * 2**20, 128 * 2**10
"""Of the log of a whole start, and of one sub-step in it: its end."""


class Child:
    """One sub-step's process, the leader of a group of its own."""

    def __init__(self, sub_step: SubStep, context: Context, scratch: Path):
        """scratch: of all sub-steps; kernels and compiled graphs are kept there for the later ones."""
        self.sub_step = sub_step
        self._folder = Path(context.scratch)
        self._folder.mkdir(parents=True)
        self._output = self._folder.with_suffix(".log")
        environment = {
            **os.environ, **context.to_environment(), "TMPDIR": str(self._folder), "DS_ACCELERATOR": context.device,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "TORCH_EXTENSIONS_DIR": str(scratch / "extensions"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "true",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.gpu_steps", sub_step.call, json.dumps(sub_step.arguments)]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started = time.monotonic()

    def go(self) -> None:
        """Its turn begins."""
        self.started = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it failed already: `wait` says so
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def seconds(self) -> float:
        """Since its turn began."""
        return time.monotonic() - self.started

    def wait(self, limit_s: float) -> bool:
        """Whether it ended within so many seconds of its turn."""
        try:
            self._process.wait(max(0.0, limit_s - self.seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """End it and all that it started; nothing of it is left but its output."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in below:  # compilers' workers have sessions of their own
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def code(self) -> int | None:
        return self._process.poll()

    def output(self) -> str:
        """The end of what it printed."""
        if not self._output.is_file():
            return ""
        with self._output.open("rb") as file:
            file.seek(max(0, self._output.stat().st_size - LOG_SHARE))
            return file.read().decode(errors="replace")

    def error(self) -> str:
        return self.output().strip()[-ERROR_CHARACTERS:]

    def log_to(self, file: Path) -> None:
        """Its output's end, behind a heading, unless the log is full."""
        text = f"\n==== {self.sub_step.key}, exit code {self.code()}\n{self.output()}"
        if (file.stat().st_size if file.is_file() else 0) + len(text.encode()) < LOG_BYTES:
            with file.open("a", encoding="utf-8") as log:
                log.write(text)


def new_scratch() -> Path:
    """A folder for everything that runs write and nobody keeps."""
    return Path(tempfile.mkdtemp(prefix="gpu_benchmark_"))
