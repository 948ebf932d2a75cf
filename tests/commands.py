"""Real commands in real processes, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.runtime.processes import free_port

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TRAIN, PLAN, REPORT, EXPORT = (ROOT / "launch" / name for name in ("train.py", "plan.py", "report.py", "export.py"))
SMALL = (
    "+recipe=quickstart", "model=llama_tiny", "data.max_files=30", "data.seq_length=64", "batch.global_size=8",
    "batch.micro_size=2", "train.steps=4", "scheduler.warmup_steps=1", "eval.new_tokens=8",
)  # fmt: skip
"""A whole run in seconds: real text, a tiny model."""


EXTENSIONS = str(Path(tempfile.gettempdir()) / f"torch_extensions_of_tests_{os.getuid()}")
"""Where torch keeps what it compiles: one folder, or each private cache would compile the engine's kernel again."""


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
        "TORCH_EXTENSIONS_DIR": EXTENSIONS,
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


def run(command: list, cwd: Path, env: dict[str, str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s
    )


def rows(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) of a run's metrics.jsonl."""
    all_rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in all_rows if "split" not in r], [r for r in all_rows if "split" in r]
