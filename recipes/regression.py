"""A number for each row: from columns of numbers with a linear model, or from a text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from conf.schema import Config
from recipes import counted
from recipes.base import Prediction
from recipes.data.examples import Example
from recipes.data.numbers import read_number
from recipes.data.rows import Meter, Problems, Row, check_content
from recipes.supervised import NO_TEXT, RECORDS, Supervised
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

KINDS = {"line": "recipes.data.numbers:LineSource", **RECORDS}
METRICS = {"loss": "min", "mse": "min", "r2": "max"}
KEYS = ("text", "features", "label")
LARGEST_TARGET = 1e18
SAMPLE = 512
"""Rows that are looked at for the size of their numbers."""


class _Numbers(Supervised):
    """The loss is the squared error, its mean over rows."""

    KINDS = KINDS
    KEYS = KEYS
    METRICS = METRICS

    def hf_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        import recipes.models.linear  # noqa: F401 - makes the linear model known to transformers

        return AutoModelForSequenceClassification

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        texts = {"text": content["text"]} if "text" in content else {}
        problems = check_content(texts, where, columns) if texts else []
        for name in content:
            if name != "text":
                number = read_number(content[name], where, columns[name])
                if isinstance(number, Problem):
                    problems.append(number)
                elif name == "label" and abs(number) > LARGEST_TARGET:
                    rule = f"column '{columns[name]}' must be at most {LARGEST_TARGET:g}: it is squared in float32"
                    problems.append(Problem(where, f"{number:g}", rule, "numbers in a larger unit"))
                else:
                    content[name] = number
        return problems

    def remarks(self) -> list[str]:
        """Also columns that no learning rate of a recipe fits: nothing is scaled here unasked."""
        rows = [self.train.row(number) for number in range(min(len(self.train), SAMPLE))]
        columns = {"label": [row["target"][0] for row in rows]}
        for place, name in enumerate(self.cfg.data.features):
            columns[name] = [row["features"][place] for row in rows]
        notes = []
        for name, numbers in columns.items():
            middle, spread = float(np.mean(numbers, dtype=np.float64)), float(np.std(numbers, dtype=np.float64))
            if spread > 100 or abs(middle) > 100 * max(spread, 1):
                notes.append(f"{name} is {middle:.3g} ± {spread:.2g}")
        scaled = f"{', '.join(notes)}: numbers of 0 ± 1 are learned much faster, scale them"
        return [*super().remarks(), *([scaled] if notes else [])]

    def collate_labels(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        targets, supervised = np.zeros(size, np.float32), np.zeros(size, bool)
        for number, row in enumerate(rows):
            targets[number], supervised[number] = row["target"][0], True
        return {"target": targets, "supervised": supervised}

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        errors = (outputs.logits[:, 0].float() - batch["target"].float()) ** 2
        return (errors * batch["supervised"]).sum()

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"value": outputs.logits[:, 0].float().cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        return [
            {
                "id": int(batch["id"][number]),
                "prediction": float(outputs["value"][number]),
                "label": float(batch["target"][number]),
            }
            for number in np.flatnonzero(batch["id"] >= 0)
        ]

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import regression_scores

        return regression_scores([row["prediction"] for row in predictions], [row["label"] for row in predictions])


class NumberRegression(_Numbers):
    """From columns of numbers; by default with one linear layer. Their names stay with the model."""

    UNUSED = (*Supervised.UNUSED, *NO_TEXT, "data.text")
    ARRAYS = {"features": "float32", "target": "float32"}  # noqa: RUF012 - never changed

    def check(self) -> list[Problem]:
        features, label = self.cfg.data.features, self.cfg.data.label or "label"
        for name in dict.fromkeys(features):
            if name == label or features.count(name) > 1:
                rule = f"'{name}' is the label" if name == label else f"'{name}' stands there twice"
                rest = ",".join(one for one in dict.fromkeys(features) if one != label)
                return [Problem("data.features", f"[{','.join(features)}]", rule, f"data.features=[{rest}]")]
        return super().check()

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {**{f"features.{name}": name for name in data.features}, "label": data.label or "label"}

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        return [[self._example(row.content)] for row in rows]

    def _example(self, content: dict[str, Any]) -> Example:
        numbers = content.get("features") or [content[f"features.{name}"] for name in self.cfg.data.features]
        target = content["target"] if "target" in content else content["label"]
        return {"features": np.array(numbers, np.float32), "target": np.array([target], np.float32)}

    def scratch_defaults(self) -> dict[str, Any]:
        return {"num_features": len(self.train.row(0)["features"])}

    def check_model(self) -> list[Problem]:
        has, wants = len(self.held_out.row(0)["features"]), getattr(self.model_config(), "num_features", None)
        if self._folder and wants not in (None, has):
            rule = f"the model takes {wants} features, a row has {has}"
            return [Problem("data.features", ",".join(self.cfg.data.features), rule, "the columns it was trained on")]
        given, known = self.cfg.data.features, self._of_model()
        if known and any(name in known and known.index(name) != place for place, name in enumerate(given)):
            rule = f"the model takes them in another order: {', '.join(known)}"
            return [Problem("data.features", f"[{','.join(given)}]", rule, f"data.features=[{','.join(known)}]")]
        return super().check_model()

    def _of_model(self) -> list[str]:
        """The names of a saved model's features in its order; empty where it has none."""
        file = self._folder / "config.json" if self._folder else None
        return json.loads(file.read_text(encoding="utf-8")).get("features", []) if file and file.is_file() else []

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        if self.cfg.data.features:
            config.features = self.cfg.data.features  # type: ignore[attr-defined]

    def model_config(self) -> PretrainedConfig:
        import recipes.models.linear  # noqa: F401 - makes the linear model known to transformers

        return super().model_config()

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        width = len(self.held_out.row(0)["features"])
        features = np.zeros((size, width), np.float32)
        for number, row in enumerate(rows):
            features[number] = row["features"]
        ids = np.array([int(row["id"]) for row in rows] + [-1] * (size - len(rows)))
        return {"features": features, "id": ids, **self.collate_labels(rows, size)}

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        rows = int(batch["supervised"].sum())
        return rows, rows

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["id"])

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        return (config.num_features,)

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"features": batch["features"]}

    def save_processor(self, folder: Path) -> None:
        pass


class TextRegression(TextTask, _Numbers):
    """From a text, with a head of one number on an encoder or decoder."""

    ARRAYS = {**TextTask.ARRAYS, "target": "float32"}  # noqa: RUF012 - never changed
    METRICS = METRICS
    KINDS = RECORDS
    KEYS = KEYS
    collate_labels = _Numbers.collate_labels  # TextTask, which comes first, has one for tasks without labels

    def columns(self) -> dict[str, str]:
        return {"text": self.cfg.data.text, "label": self.cfg.data.label or "label"}

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield content["text"]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        return [
            [{**inputs, "target": np.array([row.content["label"]], np.float32)}]
            for row, inputs in zip(rows, self.encoded(rows, problems, meter), strict=True)
        ]

    def target_of(self, row: Example) -> str:
        return f"{row['target'][0]:g}"

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        config.num_labels, config.problem_type = 1, "regression"

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        return int(batch["supervised"].sum()), self.real_tokens(batch)


def choose(cfg: Config) -> _Numbers:
    """Numbers where columns of numbers are named, a text otherwise."""
    return NumberRegression(cfg) if counted(cfg) == "rows" else TextRegression(cfg)


recipe = choose
