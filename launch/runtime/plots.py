"""Curves of runs, from their metrics.jsonl."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError
from recipes import counted, durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Okabe & Ito 2008: distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = (
    ("loss", "loss, mean over targets"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm before clipping"),
    ("tokens_per_s", "throughput"),
)
MANY_STEPS = 200
"""From this many steps on, the loss is drawn smoothed over a faint line of the raw one."""


@dataclass(frozen=True)
class RunMetrics:
    """Rows of one run: of its optimizer steps, and of its evaluations. unit: what `tokens` of a row counts."""

    name: str
    steps: list[Row]
    held_out: list[Row]
    unit: str = "tokens"


def read_metrics(run_dir: Path) -> RunMetrics:
    """The metrics of a run directory.

    Raises RequestError for a folder that does not exist, has no metrics.jsonl or an empty one, and for a line that is
    not a row (with file and line). A last line without its end is being written, or never was finished: it is left out.
    """
    if not run_dir.is_dir():
        raise RequestError(Problem("RUN_DIR", str(run_dir), "no such folder", _neighbour(run_dir)))
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise RequestError(
            Problem("RUN_DIR", str(run_dir), "no metrics.jsonl in it: not a run directory", _runs_below(run_dir))
        )
    steps: list[Row] = []
    held_out: list[Row] = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(Problem("RUN_DIR", str(file), f"cannot be read: {error.strerror or error}")) from None
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if row["loss"] is None:  # a bad step, without an update
                continue
            (held_out if "split" in row else steps).append(
                {**row, "step": int(row["step"]), "loss": float(row["loss"])}
            )
        except (ValueError, KeyError, TypeError):
            shown = line[:60].decode("utf-8", "replace")
            rule = f"not a row of metrics (one JSON object with step and loss): {shown!r}"
            raise RequestError(Problem(f"{file}:{number}", "", rule, "remove the line")) from None
    if not steps and not held_out:
        raise RequestError(Problem("RUN_DIR", str(run_dir), "metrics.jsonl has no rows: the run made no step"))
    return RunMetrics(run_dir.resolve().name, steps, held_out, _unit(run_dir / "config.yaml"))


def _unit(config: Path) -> str:
    """`recipes.counted` of a run's own configuration; a folder with metrics alone is taken for one of texts."""
    from omegaconf import OmegaConf

    try:
        return counted(OmegaConf.load(config))
    except Exception:  # not there, not YAML, or not of a run: whatever a person has made of it
        return "tokens"


def plot_loss(run_dir: Path) -> Path:
    """Write `loss.png` into a run directory: training loss and held-out points over steps. Returns its path."""
    run = read_metrics(run_dir)

    def draw(axes: Any) -> None:
        _loss(axes, run, COLOURS[0], "training", COLOURS[1], "held out")
        axes.set_title(run.name)
        axes.legend(frameon=False)

    return _figure(run_dir / "loss.png", (8, 4.5), (1, 1), draw)


def plot_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one image with loss, learning rate, gradient norm and throughput of all runs. Returns its path."""
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):  # same folder name in two places: the paths tell them apart
        labels = [str(run_dir) for run_dir in run_dirs]

    def draw(grid: Any) -> None:
        for axes, (key, title) in zip(grid.flat, PANELS, strict=True):
            for index, run in enumerate(runs):
                colour = COLOURS[index % len(COLOURS)]
                if key == "loss":
                    _loss(axes, run, colour, labels[index], colour, f"{labels[index]}, held out")
                else:
                    rows = [row for row in run.steps if row.get(key) is not None]
                    axes.plot([row["step"] for row in rows], [row[key] for row in rows], color=colour, linewidth=1.2)
            if key != "loss":
                units = " or ".join(dict.fromkeys(f"{run.unit}/s" for run in runs))
                axes.set_ylabel(f"{title} ({units})" if key == "tokens_per_s" else title)
                axes.set_ylim(bottom=0)  # after all runs are drawn: it ends the automatic scaling
            axes.set_xlabel("optimizer step")
            axes.set_xlim(left=0)
        handles, names = grid.flat[0].get_legend_handles_labels()
        grid.flat[0].figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)

    return _figure(out, (12, 7.5), (2, 2), draw)


def _loss(axes: Axes, run: RunMetrics, colour: str, label: str, held_out_colour: str, held_out_label: str) -> None:
    steps, losses = [row["step"] for row in run.steps], [row["loss"] for row in run.steps]
    if len(steps) >= MANY_STEPS:
        axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(steps, _smoothed(losses), color=colour, linewidth=1.6, label=label)
    elif steps:
        axes.plot(steps, losses, color=colour, linewidth=1.4, label=label)
    if run.held_out:
        points = [row["step"] for row in run.held_out], [row["loss"] for row in run.held_out]
        axes.plot(
            *points, "o", color=held_out_colour, markeredgecolor="white", markersize=6, label=held_out_label, zorder=3
        )
    axes.set_ylabel(PANELS[0][1])
    axes.set_xlabel("optimizer step")


def _smoothed(values: list[float]) -> list[float]:
    """Centred moving average over 2% of the run; the window shrinks at both ends, so that the curve does not lag."""
    sums = [0.0, *itertools.accumulate(values)]
    half, count = max(1, len(values) // 100), len(values)
    result = []
    for index in range(count):
        reach = min(half, index, count - 1 - index)
        result.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return result


def _figure(out: Path, size: tuple[float, float], grid: tuple[int, int], draw: Callable[[Any], None]) -> Path:
    # Not through pyplot: it would switch the backend of a notebook, and keep every figure of a long process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(*grid)
    try:
        draw(axes)
        for one in figure.axes:
            one.grid(alpha=0.25)
            one.spines[["top", "right"]].set_visible(False)
        with durable.replacing(out) as scratch:
            figure.savefig(scratch, dpi=140)
    except OSError as error:
        raise RequestError(Problem("out", str(out), f"cannot be written: {error.strerror or error}")) from error
    return out


def _neighbour(run_dir: Path) -> str:
    from conf.errors import did_you_mean

    if not run_dir.parent.is_dir():
        return ""
    near = did_you_mean(run_dir.name, [entry.name for entry in run_dir.parent.iterdir() if entry.is_dir()])
    return str(run_dir.parent / near) if near else ""


def _runs_below(folder: Path) -> str:
    found = sorted(str(file.parent) for file in folder.glob("*/metrics.jsonl"))
    return " ".join(found[:3])
