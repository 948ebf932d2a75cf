"""metrics.jsonl and the trackers. Rank 0 alone writes."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.schema import Config
from recipes.durable import append_lines, replace_text

Row = dict[str, Any]


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
        self._files = {
            name: (run_dir / f"{name}.csv").open("w", newline="", encoding="utf-8")
            for name in ("metrics", "evaluations")
        }
        self._writers: dict[str, csv.DictWriter] = {}

    def begin(self, rows: list[Row]) -> None:
        self._writers.clear()
        for file in self._files.values():
            file.seek(0)
            file.truncate()
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        name = "evaluations" if "split" in row else "metrics"
        if name not in self._writers:
            self._writers[name] = csv.DictWriter(self._files[name], list(row), extrasaction="ignore")
            self._writers[name].writeheader()
        self._writers[name].writerow(row)
        self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "csv": Csv}


class MetricsLog:
    """Appends rows to metrics.jsonl (each on disk before the next step) and hands them to the trackers.

    A full disk, or a folder that went away, does not end the run: rows wait in memory, and are written when they can.
    """

    def __init__(
        self, path: Path, trackers: list[Tracker], rows: int = 0, step: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """rows, step: as of `cut`."""
        self._path, self._trackers, self._say = path, trackers, say
        self._waiting: list[str] = []
        # stale: the file has rows that were cut, and could not be written since; all that counts waits in memory.
        self._stale = self._failed = False
        self._cut(rows, step)

    def cut(self, rows: int, step: int) -> None:
        """Drop what came behind the first `rows` rows, and behind a step; half a line, left by a crash, is none.

        The log may have fewer rows than the run: those before are in another directory's, or gone.
        """
        try:
            self._cut(rows, step)
        except OSError as error:
            self._failure(error)

    def _cut(self, rows: int, step: int) -> None:
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if rows and self._path.is_file() else []
        )
        lines = ([] if self._stale else [line for line in lines if line.endswith("\n")]) + self._waiting
        self._waiting = [line for line in lines[:rows] if json.loads(line)["step"] <= step]
        self._stale = True
        for tracker in list(self._trackers):
            try:
                tracker.begin([json.loads(line) for line in self._waiting])
            except OSError as error:
                self._give_up(tracker, error)
        self._replace()

    def _replace(self) -> None:
        """Put the rows that wait in the place of those in the file."""
        replace_text(self._path, "".join(self._waiting))
        self._waiting, self._stale, self._failed = [], False, False

    def log(self, row: Row) -> None:
        """Write a row. The trackers get it in any case."""
        self._waiting.append(json.dumps(row, allow_nan=False) + "\n")
        self._write()
        for tracker in list(self._trackers):
            try:
                tracker.log(row)
            except OSError as error:
                self._give_up(tracker, error)

    def _write(self) -> None:
        try:
            if self._stale:
                self._replace()
                return
            # Opened for each row: the file may be gone.
            append_lines(self._path, "".join(self._waiting))
            self._waiting.clear()
            self._failed = False
        except OSError as error:
            self._failure(error)

    def _failure(self, error: OSError) -> None:
        if not self._failed:
            self._say(f"metrics cannot be written for now ({self._path}: {error.strerror}); training goes on")
        self._failed = True

    def _give_up(self, tracker: Tracker, error: OSError) -> None:
        self._say(f"{type(tracker).__name__} cannot write any more ({error}); training goes on without it")
        self._trackers.remove(tracker)

    def close(self) -> None:
        """Write what still waits, and close the trackers."""
        if self._waiting:
            self._write()
        for tracker in list(self._trackers):
            try:
                tracker.close()
            except OSError as error:
                self._give_up(tracker, error)
