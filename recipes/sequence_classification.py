"""Which class a text, or a pair of texts, belongs to; or which of several at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from recipes.base import Prediction
from recipes.data.examples import Example
from recipes.data.rows import Meter, Problems, Row, check_content
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class SequenceClassification(TextTask):
    """One class per row by softmax, or with `data.multi_label` any number of them by a sigmoid each."""

    KINDS = {"stdlib": "recipes.data.packages:PackagesSource", **RECORDS}  # noqa: RUF012 - never changed
    KEYS = ("text", "pair", "label", "labels", "multi_label")
    ARRAYS = {**TextTask.ARRAYS, "labels": "int32"}  # noqa: RUF012
    METRICS = {"loss": "min", "accuracy": "max", "macro_f1": "max", "mcc": "max", "micro_f1": "max"}  # noqa: RUF012

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        pair = {"pair": data.pair} if data.pair else {}
        return {"text": data.text, **pair, "label": data.label or "label"}

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        texts = {name: value for name, value in content.items() if name != "label"}
        problems = check_content(texts, where, columns)
        for label in content["label"] if self._many(content["label"]) else [content["label"]]:
            if isinstance(label, bool) or not isinstance(label, str | int):
                wanted = "a list of names or numbers" if self.cfg.data.multi_label else "a name or a number"
                rule = f"column '{columns['label']}' must be {wanted}"
                problems.append(Problem(where, repr(label), rule))
                break
        return problems

    def _many(self, label: Any) -> bool:
        return self.cfg.data.multi_label and isinstance(label, list)

    def is_empty(self, content: dict[str, Any]) -> bool:
        return not content["text"].strip() or content["label"] == ""

    def classes_of(self, content: dict[str, Any]) -> Iterator[str]:
        label = content["label"]
        if self._many(label):
            yield from map(self.named, label)
        elif self.cfg.data.multi_label:
            yield from (self.named(name.strip()) for name in str(label).split("|") if name.strip())
        else:
            yield self.named(label)

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield content["text"]
        if "pair" in content:
            yield content["pair"]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        examples: list[list[Example]] = []
        for row, inputs in zip(rows, self.encoded(rows, problems, meter), strict=True):
            classes = [self.number_of(label, row.where, problems) for label in self.classes_of(row.content)]
            numbers = [number for number in classes if number is not None]
            if self.cfg.data.multi_label:
                labels = np.isin(np.arange(len(self.labels)), numbers).astype(np.int32)
            else:
                labels = np.array(numbers or [IGNORE], np.int32)
            examples.append([{**inputs, "labels": labels}])
        return examples

    def hf_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        many = self.cfg.data.multi_label
        config.problem_type = "multi_label_classification" if many else "single_label_classification"

    def collate_labels(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        width = len(self.labels) if self.cfg.data.multi_label else 1
        labels = np.full((size, width), IGNORE, np.int64)
        for number, row in enumerate(rows):
            labels[number] = row["labels"]
        return {"labels": labels}

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        return int((batch["labels"][:, 0] != IGNORE).sum()), self.real_tokens(batch)

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional as F

        logits, labels = outputs.logits.float(), batch["labels"]
        if not self.cfg.data.multi_label:
            return F.cross_entropy(logits, labels[:, 0], ignore_index=IGNORE, reduction="sum")
        each = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none").mean(1)
        return (each * (labels[:, 0] != IGNORE)).sum()

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"logits": outputs.logits.float().cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        found = []
        for number in np.flatnonzero(batch["id"] >= 0):
            logits, labels = outputs["logits"][number], batch["labels"][number]
            sides: Any = (int(logits.argmax()), int(labels[0]))
            named: Any = [self.labels[one] for one in sides] if not self.cfg.data.multi_label else None
            if named is None:
                sides = [np.flatnonzero(values > 0).tolist() for values in (logits, labels)]
                named = [[self.labels[one] for one in side] for side in sides]
            found.append({"id": int(batch["id"][number]), "prediction": named[0], "label": named[1], "_": sides})
        return found

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import classification_scores, multi_label_scores

        predicted, labels = (list(column) for column in zip(*(row["_"] for row in predictions), strict=True))
        if not self.cfg.data.multi_label:
            return classification_scores(predicted, labels, len(self.labels))
        size = len(self.labels)
        chosen, right = ([[int(n in row) for n in range(size)] for row in side] for side in (predicted, labels))
        return multi_label_scores(chosen, right, size)

    def details(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        from recipes.scores import confusion, per_label

        if self.cfg.data.multi_label:
            return {}
        predicted, labels = (list(column) for column in zip(*(row["_"] for row in predictions), strict=True))
        return {
            "per_label": per_label(predicted, labels, self.labels),
            "confusion": confusion(predicted, labels, len(self.labels)),
        }


recipe = SequenceClassification
