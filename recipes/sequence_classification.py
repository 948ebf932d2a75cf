"""Which class a text, or a pair of texts, belongs to; or which of several at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from conf.errors import Problem
from conf.rules_values import shown
from recipes.base import Prediction
from recipes.data.classes import normalised
from recipes.data.examples import Example
from recipes.data.rows import Meter, Problems, Row, check_content, wrong_class
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


ONE: Final = "single_label_classification"
MANY: Final = "multi_label_classification"
"""`problem_type` of transformers."""


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
        text = content["label"] if isinstance(content["label"], str) else ""
        if self.cfg.data.multi_label and text.lstrip().startswith("["):
            rule = f"column '{columns['label']}' is a text that looks like a list"
            problems.append(Problem(where, text[:60], rule, 'a|c, or in jsonl a list: ["a", "c"]'))
        for label in content["label"] if self._many(content["label"]) else [content["label"]]:
            wanted = "a list of names or whole numbers" if self.cfg.data.multi_label else "a name or a whole number"
            if wrong := wrong_class(label, where, columns["label"], wanted):
                problems.append(wrong)
                break
        many = not problems and self.cfg.data.multi_label
        names = [normalised(name) for name in self._names(content["label"])] if many else []
        if len(set(names)) < len(names):
            rule = f"column '{columns['label']}' has a class twice; it must list the classes of the row, each once"
            problems.append(Problem(where, str(content["label"])[:60], rule, '["a", "c"], or [0, 2]'))
        return problems

    def check_evaluation(self) -> list[Problem]:
        foreign = ("mcc",) if self.cfg.data.multi_label else ("micro_f1",)
        if self.cfg.eval.metric in foreign:
            rule = f"there is none with data.multi_label={shown(self.cfg.data.multi_label)}"
            return [Problem("eval.metric", foreign[0], rule, "eval.metric=macro_f1")]
        return super().check_evaluation()

    def _names(self, label: Any) -> list[Any]:
        """The classes of a row that has any number of them: a list, or names with a | between."""
        return label if isinstance(label, list) else [name for part in str(label).split("|") if (name := part.strip())]

    def _many(self, label: Any) -> bool:
        return self.cfg.data.multi_label and isinstance(label, list)

    def check_model(self) -> list[Problem]:
        many = self.cfg.data.multi_label
        if self._folder and self.finished:
            known = json.loads((self._folder / "config.json").read_text(encoding="utf-8")).get("problem_type")
            if known in (ONE, MANY) and known != (MANY if many else ONE):
                rule = f"the model was trained with problem_type={known}"
                return [Problem("data.multi_label", shown(many), rule, f"data.multi_label={shown(not many)}")]
        return super().check_model()

    def labels_of(self, content: dict[str, Any]) -> Iterator[Any]:
        label = content["label"]
        yield from self._names(label) if self.cfg.data.multi_label else [label]

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

    def target_of(self, row: Example) -> str:
        labels = row["labels"]
        numbers = np.flatnonzero(labels) if self.cfg.data.multi_label else labels
        return ", ".join(self.labels[number] for number in numbers) or "no class"

    def hf_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        many = self.cfg.data.multi_label
        config.problem_type = MANY if many else ONE

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
            if self.cfg.data.multi_label:
                named: Any = [[self.labels[one] for one in np.flatnonzero(side > 0)] for side in (logits, labels)]
            else:
                named = [self.labels[int(logits.argmax())], self.labels[int(labels[0])]]
            found.append({"id": int(batch["id"][number]), "prediction": named[0], "label": named[1]})
        return found

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import classification_scores, multi_label_scores

        if not self.cfg.data.multi_label:
            return classification_scores(*self.sides(predictions), len(self.labels))
        return multi_label_scores(*self._matrices(predictions), len(self.labels))

    def _matrices(self, predictions: Sequence[Prediction]) -> tuple[list[list[int]], list[list[int]]]:
        """Which classes were predicted, and which are right, as 0/1 matrices (rows × classes)."""
        chosen, right = (
            [[int(name in row[side]) for name in self.labels] for row in predictions]
            for side in ("prediction", "label")
        )
        return chosen, right

    def details(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        from recipes.scores import per_label_of_sets

        if not self.cfg.data.multi_label:
            return self.class_tables(predictions)
        return {"per_label": per_label_of_sets(*self._matrices(predictions), self.labels)}


recipe = SequenceClassification
