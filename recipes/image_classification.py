"""What is to be seen in an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes.base import Prediction
from recipes.data.examples import Example
from recipes.data.rows import Meter, Problems, Row
from recipes.supervised import IGNORE, NO_TEXT, Supervised

if TYPE_CHECKING:
    import torch

PROCESSOR = "preprocessor_config.json"
MEAN, STD = 0.5, 0.5
"""Of pixels in 0 to 1, for a new model; a pretrained one says its own."""


class ImageClassification(Supervised):
    """Images are resized to the model's size once; pixels are scaled when they are read."""

    KINDS = {  # noqa: RUF012 - never changed
        "digits": "recipes.data.images:DigitsSource",
        "idx": "recipes.data.images:IdxSource",
        "images": "recipes.data.images:ImageFolderSource",
        "hub": "recipes.data.hub:HubSource",
    }
    KEYS = ("image", "label", "labels", "target_path", "eval_target_path")
    ARRAYS = {"pixels": "uint8", "labels": "int32"}  # noqa: RUF012
    UNUSED = (*Supervised.UNUSED, *NO_TEXT)
    METRICS = {"loss": "min", "accuracy": "max", "macro_f1": "max", "mcc": "max"}  # noqa: RUF012

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {"image": data.image or "image", "label": data.label or "label"}

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        value = content["image"]
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            return [Problem(where, "", f"column '{columns['image']}' holds no image")]
        import io

        from recipes.data.images import pixels

        try:
            content["image"] = pixels(io.BytesIO(value["bytes"]) if value.get("bytes") else Path(value["path"]))
        except Exception as error:  # a broken image raises anything, by its format
            return [Problem(where, "", f"column '{columns['image']}' holds no readable image ({error})")]
        return []

    def is_empty(self, content: dict[str, Any]) -> bool:
        return False

    def classes_of(self, content: dict[str, Any]) -> Iterator[str]:
        yield self.named(content["label"])

    @property
    def _shape(self) -> tuple[int, int]:
        """(side of the square, channels) that the model wants. Raises RequestError where nothing says it."""
        size = getattr(self._settings, "image_size", None) or self._processor().get("size")
        if isinstance(size, Mapping):
            size = size.get("height") or size.get("shortest_edge")
        if size is None:
            rule = "neither its configuration (image_size) nor a preprocessor_config.json says how large images are"
            path = self.cfg.model.path or self.cfg.model.type
            raise RequestError(Problem("model.path", str(path), rule, "model.config.image_size=224, or another model"))
        return (size if isinstance(size, int) else size[0]), getattr(self._settings, "num_channels", 3)

    def _processor(self) -> dict[str, Any]:
        """What a pretrained model says of its images."""
        file = self._folder / PROCESSOR if self._folder else None
        return json.loads(file.read_text()) if file is not None and file.is_file() else {}

    @property
    def _settings(self) -> Any:
        if not hasattr(self, "_config"):
            self._config = self.model_config()
        return self._config

    def ready(self, root: Path, source: Any, fingerprint: str, progress: Any) -> list[str]:
        return [str(self._shape)]

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        from recipes.data.images import resize

        examples: list[list[Example]] = []
        for row in rows:
            label = self.number_of(self.named(row.content["label"]), row.where, problems)
            pixels = resize(row.content["image"], *self._shape)
            examples.append([{"pixels": pixels, "labels": np.array([IGNORE if label is None else label], np.int32)}])
        return examples

    def hf_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) by channel."""
        channels, found = self._shape[1], self._processor()
        mean, std = np.full(channels, MEAN, np.float32), np.full(channels, STD, np.float32)
        if found:
            if found.get("do_flip_channel_order"):
                rule = "its images have blue first (do_flip_channel_order), which is not done here"
                raise RequestError(Problem("model.path", str(self.cfg.model.path), rule, "another model"))
            scaled = found.get("do_normalize", "image_mean" in found)
            mean = np.broadcast_to(np.array(found["image_mean"] if scaled else 0.0, np.float32), (channels,))
            std = np.broadcast_to(np.array(found["image_std"] if scaled else 1.0, np.float32), (channels,))
            factor = 255 * (found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0)
            mean, std = mean / np.float32(factor), std / np.float32(factor)
        return mean, std

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        side, channels = self._shape
        if not hasattr(self, "_mean"):
            self._mean, self._std = self._scale()
        pixels = np.zeros((size, side, side, channels), np.float32)
        labels = np.full(size, IGNORE, np.int64)
        for number, row in enumerate(rows):
            pixels[number] = (row["pixels"].reshape(side, side, channels) / np.float32(255) - self._mean) / self._std
            labels[number] = row["labels"][0]
        ids = np.array([int(row["id"]) for row in rows] + [-1] * (size - len(rows)))
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), "labels": labels, "id": ids}

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        rows = int((batch["labels"] != IGNORE).sum())
        return rows, rows

    def places(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["id"])

    def row_length(self) -> int:
        """Patches of an image, with one in front of them."""
        patch = self.cfg.model.config.get("patch_size", 16)
        return (self.cfg.model.config.get("image_size", 224) // patch) ** 2 + 1

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
        side, _ = self._shape
        mean, std = self._scale()
        settings = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": mean.tolist(), "image_std": std.tolist(),
        }  # fmt: skip
        (folder / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n")


recipe = ImageClassification
