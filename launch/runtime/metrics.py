"""metrics.jsonl and the trackers. Rank 0 alone writes."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.schema import Config
from recipes.durable import append_lines, replace_text, synchronise

Row = dict[str, Any]


class Lines:
    """A file of whole lines; what cannot be written now (a full disk, a folder that went away) waits in memory."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda text: None):
        self.path, self._say = path, say
        self.waiting: list[str] = []
        """Lines that are not in the file yet; all of them where `stale`."""
        self.stale = self._failed = False
        """stale: what is in the file no longer counts."""

    def hold(self, lines: list[str]) -> None:
        """Let the file hold these lines and no others."""
        self.waiting, self.stale = lines, True
        self.write()

    def add(self, line: str) -> None:
        self.waiting.append(line)
        self.write()

    def write(self) -> bool:
        """Write what waits. False: not yet, which is said once."""
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                self._say(f"{self.path} cannot be written for now ({error.strerror}); training goes on")
            self._failed = True
        return not self._failed

    def settle(self) -> None:
        """Write what waits, all of it to the disk. Raises OSError."""
        self._write()
        if self.path.exists():
            synchronise(self.path)

    def _write(self) -> None:
        if self.stale:
            replace_text(self.path, "".join(self.waiting))
        elif self.waiting:
            # Opened for each row: the file may be gone.
            append_lines(self.path, "".join(self.waiting))
        self.waiting, self.stale, self._failed = [], False, False


class Tracker(ABC):
    """Somewhere else that metrics go."""

    @abstractmethod
    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        """config: the resolved configuration as plain values."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """One row of metrics.jsonl; evaluation rows carry `split`."""

    def begin(self, rows: list[Row]) -> None:  # noqa: B027 - most keep what they have by step
        """Start, or start again behind these rows."""

    def close(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Flush and finish."""


def _scalars(row: Row) -> dict[str, float]:
    """{'train/loss': …}: the numbers of a row under the name of their split."""
    split = row.get("split", "train")
    return {f"{split}/{key}": value for key, value in row.items() if key not in ("step", "split") and value is not None}


class TensorBoard(Tracker):
    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, row: Row) -> None:
        for key, value in _scalars(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(project=cfg.track.project, name=cfg.name, dir=str(run_dir), config=config)

    def log(self, row: Row) -> None:
        self._run.log(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(cfg.track.project)
        mlflow.start_run(run_name=cfg.name)
        mlflow.log_dict(config, "config.json")

    def log(self, row: Row) -> None:
        self._mlflow.log_metrics(_scalars(row), step=row["step"])

    def close(self) -> None:
        self._mlflow.end_run()


class Csv(Tracker):
    """metrics.csv with the training rows and evaluations.csv with the others, for spreadsheets."""

    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        self._files = {name: Lines(run_dir / f"{name}.csv") for name in ("metrics", "evaluations")}
        self._columns: dict[str, list[str]] = {}

    def begin(self, rows: list[Row]) -> None:
        self._columns.clear()
        lines: dict[str, list[str]] = {name: [] for name in self._files}
        for row in rows:
            lines[_file_of(row)] += self._lines(row)
        for name, file in self._files.items():
            file.hold(lines[name])

    def log(self, row: Row) -> None:
        for line in self._lines(row):
            self._files[_file_of(row)].add(line)

    def _lines(self, row: Row) -> list[str]:
        """A row, behind the names of the columns where it is the first."""
        name, text = _file_of(row), io.StringIO()
        columns = self._columns.setdefault(name, [])
        writer = csv.DictWriter(text, columns or list(row), extrasaction="ignore")
        if not columns:
            columns.extend(row)
            writer.writeheader()
        writer.writerow(row)
        return text.getvalue().splitlines(keepends=True)

    def close(self) -> None:
        for file in self._files.values():
            file.settle()


def _file_of(row: Row) -> str:
    return "evaluations" if "split" in row else "metrics"


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "csv": Csv}


class MetricsLog:
    """Appends rows to metrics.jsonl (each in the file before the next step) and hands them to the trackers.

    A full disk, or a folder that went away, does not end the run: rows wait in memory, and are written when they can.
    """

    def __init__(
        self, path: Path, trackers: list[Tracker], rows: int = 0, step: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """rows, step: as of `cut`, which may raise."""
        self._lines, self._trackers, self._say = Lines(path, say), trackers, say
        self.cut(rows, step)

    def cut(self, rows: int, step: int) -> None:
        """Drop what came behind the first `rows` rows, and behind a step; half a line, left by a crash, is none.

        The log may have fewer rows than the run: those before are in another directory's, or gone. Raises OSError where
        it cannot be read.
        """
        there: list[tuple[str, Row | None]] = []
        if rows and not self._lines.stale and self._lines.path.is_file():
            there = read_rows(self._lines.path)
        there += [(line, json.loads(line)) for line in self._lines.waiting]
        kept = []
        for number, (line, row) in enumerate(there[:rows], 1):
            if row is None:
                self._say(f"{self._lines.path}:{number} is no row of metrics, and is left out: {line[:60]!r}")
            elif row["step"] <= step:
                kept.append((line, row))
        self._lines.hold([line for line, _ in kept])
        self._each(lambda tracker: tracker.begin([row for _, row in kept]))

    def log(self, row: Row) -> None:
        """Write a row. The trackers get it in any case."""
        self._lines.add(json.dumps(row, allow_nan=False) + "\n")
        self._each(lambda tracker: tracker.log(row))

    def settle(self) -> None:
        """Bring all rows to the disk. Raises OSError."""
        self._lines.settle()

    def close(self) -> None:
        """Write what still waits, and close the trackers."""
        self._lines.write()
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except OSError as error:
                self._say(f"{type(tracker).__name__} cannot write any more ({error}); training goes on without it")
                self._trackers.remove(tracker)


def read_rows(path: Path) -> list[tuple[str, Row | None]]:
    """The whole lines of a log, with the row that each is; None for one that is damaged. Raises OSError."""
    found: list[tuple[str, Row | None]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        text, row = line.decode("utf-8", "replace") + "\n", None
        try:
            row = json.loads(text)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            row = None
        found.append((text, row))
    return found
