"""The project's commands as a user starts them, in processes of their own.

`run` forks them from a server that has imported everything, unless `cold` asks for a new interpreter and launcher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import warm

from launch.runtime.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TRAIN, PLAN, REPORT, EXPORT = (ROOT / "launch" / name for name in ("train.py", "plan.py", "report.py", "export.py"))
SMALL = (
    "+recipe=quickstart", "model=llama_tiny", "data.max_files=30", "data.seq_length=64", "batch.global_size=8",
    "batch.micro_size=2", "train.steps=4", "scheduler.warmup_steps=1", "eval.new_tokens=8",
)  # fmt: skip
"""A whole run in seconds: real text, a tiny model."""


NO_TORCH = "TESTS_FORBID_TORCH"
"""In a command's environment: importing torch ends it."""


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """The user's environment without this test process's settings; caches in `cache`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    }
    return {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


def launcher(kind: str, ranks: int) -> list[str]:
    """How a user starts `ranks` ranks with `deepspeed`, `torchrun` or plain `python`."""
    port = str(free_port())
    return {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--master-port", port, "--nproc-per-node", str(ranks)],
        "deepspeed": ["deepspeed", "--master_port", port, "--num_gpus", str(ranks)],
    }[kind]


def run(
    command: list, cwd: Path, env: dict[str, str], timeout_s: float = 240, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. cold: as a user does, for what is about the start itself."""
    words = [str(word) for word in command]
    found = None if cold else _parsed(words)
    if found is None:
        return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)
    server = warm.LIGHT if NO_TORCH in env else warm.FULL
    return warm.run(*found, Path(cwd), env, timeout_s, server)


def _parsed(words: list[str]) -> tuple[str, int, int, Path, list[str]] | None:
    """(launcher, ranks, port, script, arguments) of a command of `launch/`; None where it is another one."""
    kind, ranks, port, rest = "python", 1, 0, words[1:]
    if words[0] in ("torchrun", "deepspeed"):  # as `launcher` below gives them
        kind, port, ranks, rest = words[0], int(words[2]), int(words[4]), words[5:]
    elif words[0] not in ("python", sys.executable):
        return None
    script = Path(rest[0]) if rest else Path()
    return (kind, ranks, port, script, rest[1:]) if script.parent == ROOT / "launch" else None


def rows(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of a run's metrics.jsonl."""
    all_rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in all_rows if "split" not in r], [r for r in all_rows if "split" in r]
