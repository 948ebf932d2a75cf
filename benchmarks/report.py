"""What every benchmark says of itself: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from conf.errors import RequestError
from recipes.durable import replace_text

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """Name and usable cores of this machine's processor."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found.group(1) if found else platform.processor() or platform.machine()}, {cores} cores"


def commit() -> str:
    """What is measured: the commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, encoding="utf-8", errors="replace"
        ).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def setting(*more: str, machine: str | None = None) -> str:
    """Machine, versions, `more`, commit, date. machine: None: this processor."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    parts = [machine or processor(), f"{packages}, Python {platform.python_version()}", *more]
    return "; ".join([*parts, f"commit {commit()}, {datetime.date.today()}"])


def trained(ranks: int, run_dir: Path, *overrides: str) -> float:
    """Train with the real command and return its wall time in seconds, imports and data included.

    One rank needs no launcher. Raises SystemExit with the output of a run that fails.
    """
    from launch.runtime.processes import free_port

    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launcher = (
        [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())] if ranks > 1 else [sys.executable]
    )
    command = [*launcher, str(ROOT / "launch" / "train.py"), f"run_dir={run_dir}", *overrides]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=run_dir.parent)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nexit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - started


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def publish(lines: list[str], out: str) -> None:
    """Print a report, and write it to the file `out` unless that is empty."""
    text = "\n".join(lines)
    print(text)
    if out:
        replace_text(Path(out), text + "\n")


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """A benchmark's command line: exit code 2, and no traceback, for a wrong request."""
    own = sys.modules["__main__"]
    if {"--help", "-h"} & set(sys.argv[1:]):
        print("\n".join([(own.__doc__ or "").strip(), *getattr(own, "HELP", ())]))
        raise SystemExit(0)
    try:
        code = main(sys.argv[1:])
    except RequestError as error:
        print(error.render(), file=sys.stderr)
        code = 2
    raise SystemExit(code)
