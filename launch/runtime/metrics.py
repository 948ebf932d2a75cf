"""metrics.jsonl and the trackers. Rank 0 alone writes."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from conf.schema import Config

Row = dict[str, Any]


class Tracker(ABC):
    """Somewhere else that metrics go."""

    @abstractmethod
    def __init__(self, run_dir: Path, cfg: Config, config: dict[str, Any]):
        """config: the resolved configuration as plain values."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """One row of metrics.jsonl; evaluation rows carry `split`."""

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
        self._files = {name: (run_dir / f"{name}.csv").open("w", newline="") for name in ("metrics", "evaluations")}
        self._writers: dict[str, csv.DictWriter] = {}

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
    """Appends rows to metrics.jsonl (each on disk before the next step) and hands them to the trackers."""

    def __init__(self, path: Path, trackers: list[Tracker], after: int | None = None):
        """after: carry a log on behind the rows of this step, what came later is dropped; None: a new log."""
        kept = _rows_until(path, after) if after is not None else []
        self._file = path.open("w")
        self._file.writelines(kept)
        self._file.flush()
        self._trackers = trackers

    def log(self, row: Row) -> None:
        # One write of one whole line: an interrupted run leaves no half row.
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(row)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _rows_until(path: Path, step: int) -> list[str]:
    """The lines of a log up to a step; half a line, left by a crash, is none."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = (line for line in lines if line.endswith("\n"))
    return [line for line in whole if json.loads(line)["step"] <= step]
