"""Curves of one or several runs in one image, and a table: `python launch/report.py RUN_DIR… [out=report.png]`."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table

from conf.errors import Problem, RequestError
from launch.runtime.console import plain_console
from launch.runtime.plots import RunMetrics, plot_runs, read_metrics
from launch.runtime.request import run_command, told_apart

USAGE = "launch/report.py RUN_DIR… [out=report.png]"


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(f"usage: {USAGE}\n\n{__doc__}")
        return 0
    run_dirs, out = read_arguments(argv)
    runs = gather(run_dirs)
    table = Table("run", "steps", "training loss", "held-out loss", "perplexity", "throughput (median)")
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        table.add_row(*row_of(run))
    path = plot_runs(run_dirs, out)
    console = plain_console()
    console.print(table)
    console.print(f"curves  {path}", markup=False)
    return 0


def read_arguments(argv: list[str]) -> tuple[list[Path], Path]:
    """(run directories, image to write). Raises RequestError when there is no run or something is not understood."""
    run_dirs, out, problems = [], Path("report.png"), []
    words, pairs = told_apart(argv, ("out",))
    for word in words:
        if word.startswith("-"):
            problems.append(Problem(word, "", f"not understood; usage: {USAGE}"))
        else:
            run_dirs.append(Path(word).expanduser())
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key == "out" and value:
            out = Path(value).expanduser()
        else:
            problems.append(Problem(pair, "", f"not understood; usage: {USAGE}"))
    if out.suffix.lower() != ".png":
        problems.append(Problem("out", str(out), "the image is a PNG", f"out={out.with_suffix('.png')}"))
    elif not out.absolute().parent.is_dir():
        problems.append(Problem("out", str(out), "no such folder", f"out={out.name}"))
    if not run_dirs and not problems:
        problems.append(Problem("RUN_DIR", "", f"name at least one run directory; usage: {USAGE}"))
    if problems:
        raise RequestError(problems)
    return run_dirs, out


def gather(run_dirs: list[Path]) -> list[RunMetrics]:
    """The metrics of all runs, or RequestError with what is wrong with any of them."""
    runs, problems = [], []
    for run_dir in run_dirs:
        try:
            runs.append(read_metrics(run_dir))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return runs


def row_of(run: RunMetrics) -> tuple[str, ...]:
    """Cells of one run: last training loss, last held-out loss and its perplexity, median throughput."""
    last = run.held_out[-1] if run.held_out else None
    speeds = [row["tokens_per_s"] for row in run.steps if row.get("tokens_per_s")]
    return (
        run.name,
        str(run.steps[-1]["step"]) if run.steps else "0",
        f"{run.steps[-1]['loss']:.4f}" if run.steps else "-",
        f"{last['loss']:.4f}{_behind(run)}" if last else "-",
        f"{last['perplexity']:,.1f}" if last and "perplexity" in last else "-",
        f"{statistics.median(speeds):,.0f} {run.unit}/s" if speeds else "-",
    )


def _behind(run: RunMetrics) -> str:
    """` (step 0)` where the last evaluation is older than the last step: the run is not finished."""
    evaluated, reached = run.held_out[-1]["step"], run.steps[-1]["step"] if run.steps else 0
    return f" (step {evaluated})" if evaluated < reached else ""


if __name__ == "__main__":
    run_command(main)
