"""What is to be seen in an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from recipes import hub
from recipes.base import Prediction
from recipes.data.changes import CHANGED
from recipes.data.examples import Example
from recipes.data.image_processor import FILES, ImageProcessor
from recipes.data.rows import Meter, Problems, Row, wrong_class
from recipes.supervised import IGNORE, NO_TEXT, Supervised

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class ImageClassification(Supervised):
    """The model's image processor gives images their size once, and scales their values when they are read."""

    KINDS = {  # noqa: RUF012 - never changed
        "digits": "recipes.data.images:DigitsSource",
        "idx": "recipes.data.images:IdxSource",
        "images": "recipes.data.images:ImageFolderSource",
        "hub": "recipes.data.hub:HubSource",
    }
    KEYS = ("image", "image_size", "label", "labels", "max_pixels", "target_path", "eval_target_path")
    ARRAYS = {"pixels": "uint8", "labels": "int32"}  # noqa: RUF012
    UNUSED = (*Supervised.UNUSED, *NO_TEXT)
    METRICS = {"loss": "min", "accuracy": "max", "macro_f1": "max", "mcc": "max"}  # noqa: RUF012

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {"image": data.image or "image", "label": data.label or "label"}

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        if wrong := wrong_class(content["label"], where, columns["label"]):
            return [wrong]
        value = content["image"]
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            return [Problem(where, "", f"column '{columns['image']}' holds no image")]
        import io

        from recipes.data.images import pixels

        try:
            file = io.BytesIO(value["bytes"]) if value.get("bytes") else Path(value["path"])
            content["image"] = pixels(file, self.cfg.data.max_pixels)
        except Exception as error:  # a broken image raises anything, by its format
            return [Problem(where, "", f"column '{columns['image']}' holds no readable image ({error})")]
        return []

    def labels_of(self, content: dict[str, Any]) -> Iterator[Any]:
        yield content["label"]

    @property
    def _processor(self) -> ImageProcessor:
        """Raises RequestError where nothing says how large images are."""
        if not hasattr(self, "_images"):
            path = str(self.cfg.model.path or self.cfg.model.type)
            size = self.cfg.data.image_size
            self._images = ImageProcessor.of_model(self._folder, self.model_config(), path, size)
        return self._images

    def ready(self, root: Path, source: Any, fingerprint: str, progress: Any) -> list[str]:
        return [self._processor.settings()]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        examples: list[list[Example]] = []
        for row in rows:
            label = self.number_of(self.named(row.content["label"]), row.where, problems)
            image = row.content["image"]
            if image.shape[-1] > self._processor.shape[0]:
                what = "images in colour read as grey (model.config.num_channels=3 keeps it)"
                meter.note(CHANGED, what, row.where)
            pixels = self._processor.sized(image)
            examples.append([{"pixels": pixels, "labels": np.array([IGNORE if label is None else label], np.int32)}])
        return examples

    def hf_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def check_model(self) -> list[Problem]:
        if problems := super().check_model():
            return problems
        import torch

        channels, height, width = self._processor.shape
        with torch.device("meta"):
            network = hub.new_model(self.hf_class(), self.model_config())
            try:
                network(pixel_values=torch.zeros(1, channels, height, width))
            except ValueError as error:  # families that take one size only
                rule = f"its image processor gives {height}×{width} pixels: {str(error).splitlines()[0]}"
                where = str(self.cfg.model.path or self.cfg.model.type)
                return [Problem("model.path", where, rule, f"the size of the model in {FILES[0]}")]
        return []

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        shape = self._processor.shape
        pixels = np.zeros((size, *shape), np.float32)
        labels = np.full(size, IGNORE, np.int64)
        if rows:
            pixels[: len(rows)] = self._processor.scaled([row["pixels"].reshape(shape) for row in rows])
            labels[: len(rows)] = [row["labels"][0] for row in rows]
        ids = np.array([int(row["id"]) for row in rows] + [-1] * (size - len(rows)))
        return {"pixel_values": pixels, "labels": labels, "id": ids}

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        rows = int((batch["labels"] != IGNORE).sum())
        return rows, rows

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["id"])

    def row_shape(self, config: PretrainedConfig) -> tuple[int, ...]:
        from recipes.models.pretrained import package_folder

        path = self.cfg.model.path
        source = path and (package_folder(path) or path)
        if source and self.cfg.model.subfolder and Path(source).is_dir():
            source = Path(source) / self.cfg.model.subfolder
        data, model = self.cfg.data, self.cfg.model
        return ImageProcessor.of_model(source, config, path or str(model.type), data.image_size, model.revision).shape

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional as F

        return F.cross_entropy(outputs.logits.float(), batch["labels"], ignore_index=IGNORE, reduction="sum")

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"classes": outputs.logits.argmax(-1).cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        found = []
        for number in np.flatnonzero(batch["id"] >= 0):
            named = [self.labels[int(side[number])] for side in (outputs["classes"], batch["labels"])]
            found.append({"id": int(batch["id"][number]), "prediction": named[0], "label": named[1]})
        return found

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import classification_scores

        return classification_scores(*self.sides(predictions), len(self.labels))

    def details(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        return self.class_tables(predictions)

    def save_processor(self, folder: Path) -> None:
        self._processor.save(folder)


recipe = ImageClassification
