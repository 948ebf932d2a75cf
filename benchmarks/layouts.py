"""One model in many layouts, each trained by the real command: the same losses, and what each layout costs.

    python benchmarks/layouts.py [steps=4] [layouts=1x1x1x1,2x1x1x1,1x2x1x1,…] [zero=1] [out=FILE.md] [key=value …]

A layout is data×tensor×pipeline×sequence. The other arguments are overrides of `+recipe=quickstart`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import publish, run, setting, table, trained
from conf.errors import Problem, RequestError
from launch.runtime.request import split_arguments

LAYOUTS = "1x1x1x1,2x1x1x1,1x2x1x1,1x1x2x1,1x1x1x2,2x1x2x1,1x2x2x1,2x2x1x1,1x1x2x2,2x2x2x1"
OWN = {"steps": "4", "layouts": LAYOUTS, "zero": "1", "out": ""}


def train(layout: tuple[int, ...], steps: int, zero: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of one run."""
    data, tensor, pipeline, sequence = layout
    run_dir = folder / "x".join(map(str, layout))
    trained(
        data * tensor * pipeline * sequence, run_dir, "+recipe=quickstart", f"train.steps={steps}",
        "scheduler.warmup_steps=0", f"zero=stage{zero}", f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}",
        f"parallel.sequence={sequence}", "eval.new_tokens=1", *overrides,
    )  # fmt: skip
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def row(layout: tuple[int, ...], metrics: list[dict[str, Any]], alone: int) -> list[str]:
    """Cells of the table."""
    steps = [entry for entry in metrics if "split" not in entry]
    held_out = [entry for entry in metrics if "split" in entry]
    peak = steps[-1]["peak_memory_bytes"]
    bubbles = [entry["bubble"] for entry in steps[1:] if "bubble" in entry]
    return [
        " × ".join(map(str, layout)), f"{steps[0]['loss']:.6f}", f"{steps[-1]['loss']:.6f}",
        f"{steps[0]['grad_norm']:.5f}", f"{held_out[-1]['loss']:.6f}", f"{peak / 2**20:,.0f}", f"{peak / alone:.0%}",
        f"{sum(bubbles) / len(bubbles):.0%}" if bubbles else "",
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    overrides, own = split_arguments(argv, OWN)
    try:
        layouts = [tuple(int(degree) for degree in text.split("x")) for text in own["layouts"].split(",")]
        steps = int(own["steps"])
        if any(len(layout) != 4 for layout in layouts):
            raise ValueError
    except ValueError:
        rule = "numbers, a layout as data x tensor x pipeline x sequence"
        raise RequestError(Problem("layouts, steps", f"{own['layouts']} {own['steps']}", rule, LAYOUTS)) from None
    head = ["data × tensor × pipeline × sequence", "first loss", f"loss, step {steps}", "first gradient norm",
            "held-out loss", "peak MiB of a rank", "to the first", "bubble"]  # fmt: skip
    rows, alone = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            metrics = train(layout, steps, own["zero"], overrides, Path(folder))
            alone = alone or metrics[-2]["peak_memory_bytes"]
            rows.append(row(layout, metrics, alone))
            print(" | ".join(rows[-1]), file=sys.stderr)
    command = f"`{' '.join(['python benchmarks/layouts.py', *argv])}`"
    publish([command, f"({setting()})", "", *table(head, rows)], own["out"])
    return 0


if __name__ == "__main__":
    run(main)
