"""The Recipe interface: model, rows, loss and metrics of one task. There is one loop, and it knows nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from conf.errors import Problem, did_you_mean
from conf.schema import Config

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from recipes.preview import Preview

Prediction = dict[str, Any]
"""Of one held-out row: `id`, `prediction`, `label`, and what else the task's metrics need (keys that begin with `_` are
not written down)."""
Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) while rows are read and tokenised."""
PICKED = "picked"
"""Beside the arrays of a micro-batch on the device: (n,) places in the flattened `labels` that are supervised."""


class Rows(Protocol):
    """Rows of one split: a sized, random-access collection of samples."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, np.ndarray]: ...


class Recipe(ABC):
    """One task.

    The order of calls is `check` (before torch is imported), `prepare` (before the process group exists), then
    `model_config` / `hf_class` for building, then `collate`, `loss` and `metrics` from the loop.
    """

    METRICS: ClassVar[Mapping[str, str]] = {"loss": "min"}
    """Metrics that can decide which model is best, each with min or max."""
    PICKS: ClassVar[bool] = False
    """Whether the loss looks at supervised places alone: it is then given their numbers (PICKED), which the host knows.
    """
    finished = False
    """The weights are those of a model that is only evaluated: nothing in it may be new."""
    train: Rows
    """Endless over epochs: `row(i)` takes the global sample index, any i >= 0; `len` is one epoch."""
    held_out: Rows
    """Every held-out row exactly once."""
    report: dict[str, Any]
    """What `prepare` found, JSON values; `fingerprint` changes with the rows and their encoding."""

    notes: list[str]
    """What is to be said of the model's weights."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.notes = []

    @abstractmethod
    def check(self) -> list[Problem]:
        """What is wrong with the data, as far as it shows at a glance (files, columns). Never imports torch."""

    def check_evaluation(self) -> list[Problem]:
        """What is wrong with the metric that decides."""
        metric = self.cfg.eval.metric
        if metric is None or metric in self.METRICS:
            return []
        near = did_you_mean(metric, self.METRICS) or next(iter(self.METRICS))
        rule = f"{self.cfg.task} has {', '.join(self.METRICS)}"
        return [Problem("eval.metric", metric, rule, f"eval.metric={near}")]

    @abstractmethod
    def prepare(self, progress: Progress | None = None) -> None:
        """Read, tokenise and cache the rows; afterwards `train` and `held_out` are set.

        Raises RequestError for rows or models that cannot be used, with file and line.
        """

    @abstractmethod
    def model_config(self) -> PretrainedConfig:
        """The transformers configuration of the model, vocabulary included."""

    @abstractmethod
    def hf_class(self) -> Any:
        """The Auto class that builds and loads the model."""

    @abstractmethod
    def weights(self) -> Path | None:
        """Folder of pretrained safetensors, or None for a model from scratch."""

    @abstractmethod
    def adopt(self, model: PreTrainedModel) -> None:
        """Look at the built model once: choose the loss that fits it, refuse what it cannot do (RequestError)."""

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        """A micro-batch of exactly `size` rows; missing ones are filled up with rows that supervise nothing."""

    @abstractmethod
    def widen(self, batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        """`batch` (of `width(batch)` tokens a row) with padding up to `width`, which supervises nothing."""

    def width(self, batch: Mapping[str, np.ndarray]) -> int:
        """Tokens of each row, padding included."""
        return batch["input_ids"].shape[1]

    @abstractmethod
    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """(supervised targets, real unpadded tokens) of a micro-batch: the loss's denominator and the throughput's."""

    def held_out_order(self) -> Sequence[int]:
        """Each held-out row once, in the order of evaluation; predictions are put back into that of the rows."""
        return range(len(self.held_out))

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Shape of the model's main input for one row, for the plan: its tokens at most, (C, H, W) or (F,)."""
        return (self.cfg.data.seq_length,)

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        """Places for tokens in a micro-batch, padding included."""
        return batch["input_ids"].size

    @abstractmethod
    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The arguments of the model's forward pass; on every pipeline stage."""

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum (not mean) of the loss over the supervised targets of a micro-batch, a scalar in fp32."""

    def balances_routers(self) -> bool:
        """Whether the load-balancing loss of a mixture's routers counts (`recipes.models.router_loss`)."""
        return False

    def rows(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, S) which places of a micro-batch hold real tokens, (B,) supervised targets of each row)."""
        raise NotImplementedError(f"{type(self).__name__} has no rows of tokens")

    def evaluate(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """(`loss`, what `predictions` needs) of a held-out micro-batch; arrays of (B, …), on the host."""
        return self.loss(model, batch), {}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        """The predictions for the rows of a held-out micro-batch, without those that fill it up."""
        return []

    @abstractmethod
    def metrics(self, loss: float, supervised: int, predictions: Sequence[Prediction] = ()) -> dict[str, float]:
        """Named metrics of an evaluation, `loss` (mean over supervised targets) included.

        predictions: of all held-out rows, in the order of their numbers.
        """

    def merged(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        """One prediction for each thing that is counted, from those of its parts (windows of a long text)."""
        return list(predictions)

    def details(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """More to look at after the last evaluation (a table of classes, a confusion matrix), as JSON values."""
        return {}

    def new_head(self) -> bool:
        """Whether pretrained weights may lack the head, which is then new."""
        return False

    def said(self) -> str | None:
        """A line about the data, for the log."""
        return None

    def previews(self, count: int) -> list[Preview]:
        """The first training rows as the model sees them; none for tasks without text. After `prepare`."""
        return []

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Write what turns rows into tensors (the tokenizer) beside an exported model."""

    def sample(self, folder: Path) -> str | None:
        """Something to read at the end, made by the exported model in `folder`; None when the task has nothing."""
        return None
