"""Images as a model wants them: its own Hugging Face image processor, in two halves.

What gives an image its size (resizing, cropping, the order of channels) is done once and kept as bytes; what changes
values (rescaling, normalising) is done when a batch is read. Together they are the processor, which is looked at.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import Problem, RequestError
from recipes import hub

FILE = "preprocessor_config.json"
FILES = (FILE, "processor_config.json")
"""The second one holds all processors of a model that takes more than images."""
MEAN, STD = 0.5, 0.5
"""Of values in 0 to 1, for a new model; a pretrained one says its own."""
OF_VALUES = ("do_rescale", "do_normalize", "include_top")
"""Switches of processors that change values; all others that begin with `do_` change sizes."""


class ImageProcessor:
    """shape: (channels, height, width) of every image. path: the model it belongs to, for errors."""

    def __init__(self, whole: Any, channels: int, path: str):
        self._whole, self._channels = whole, channels
        self._sizes, self._values = copy.copy(whole), copy.copy(whole)
        for name in {name for kind in (type(whole), whole) for name in dir(kind) if name.startswith("do_")}:
            setattr(self._sizes if name in OF_VALUES else self._values, name, False)
        self._sizes.include_top = False
        self.shape = self._looked_at(path)

    @classmethod
    def of_model(
        cls, source: Path | str | None, config: Any, path: str, asked: int | None = None, revision: str | None = None
    ) -> ImageProcessor:
        """That of a pretrained model, or one which only resizes to the configuration's `image_size`.

        source: the pretrained model's folder or hub name, of this `revision`. asked: `data.image_size`, pixels along
        each side. Raises RequestError where the folder has none, nothing says how large images are, or `asked` would
        have no effect.
        """
        from transformers import ViTImageProcessorPil

        channels = getattr(config, "num_channels", 3)
        if source is not None:
            if asked is not None:
                rule = f"a pretrained model's own {FILE} says how large its images are"
                raise RequestError(Problem("data.image_size", str(asked), rule, "data.image_size=null"))
            if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in FILES):
                rule = f"there is no {FILE} beside it: which values its images had is not known"
                raise RequestError(Problem("model.path", path, rule, f"a folder with the model's {FILE}"))
            try:
                # The same values with and without torchvision, whose resizing differs in the last bit.
                whole = hub.image_processor(str(source), revision=revision, backend="pil")
            except RequestError:
                raise
            except Exception as error:  # it raises anything, by what the file lacks
                rule = f"its image processor cannot be loaded ({str(error).splitlines()[0]})"
                raise RequestError(Problem("model.path", path, rule, "another model")) from None
            return cls(whole, channels, path)
        size = getattr(config, "image_size", None)
        if size is not None and asked is not None:
            nearest = f"model.config.image_size={asked} data.image_size=null"
            raise RequestError(Problem("data.image_size", str(asked), f"{path} has an image_size of its own", nearest))
        size = asked if size is None else size
        if size is None:
            rule = f"{path} takes images of any size, and nothing says which"
            raise RequestError(Problem("data.image_size", "null", rule, "data.image_size=224"))
        height, width = (size, size) if isinstance(size, int) else size
        mean, std = [MEAN] * channels, [STD] * channels
        return cls(ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=mean, image_std=std),
                   channels, path)  # fmt: skip

    def sized(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 1 or 3) uint8 → `shape` uint8."""
        return self._run(self._sizes, [self._coloured(image)], "channels_last")[0]

    def scaled(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """N times `shape`, uint8 → (N, *shape) float32."""
        return self._run(self._values, list(images), "channels_first").astype(np.float32)

    def settings(self) -> str:
        """All that the bytes of an image depend on."""
        return json.dumps([self._whole.to_dict(), self._channels], sort_keys=True, default=str)

    def save(self, folder: Path) -> None:
        self._whole.save_pretrained(str(folder))

    def _coloured(self, image: np.ndarray) -> np.ndarray:
        from recipes.data.images import coloured

        return coloured(image, self._channels)

    @staticmethod
    def _run(processor: Any, images: list[np.ndarray], order: str) -> np.ndarray:
        """(N, C, H, W)."""
        return np.stack(processor(images=images, input_data_format=order, return_tensors=None)["pixel_values"])

    def _looked_at(self, path: str) -> tuple[int, int, int]:
        """The shape of all images. Raises RequestError where they have several, or the halves are not the whole."""
        draw = np.random.default_rng(0)
        wide, tall = (self._coloured(draw.integers(0, 256, size, np.uint8)) for size in ((40, 60, 3), (60, 40, 3)))
        try:
            bytes_ = [self.sized(image) for image in (wide, tall)]
            expected = self._run(self._whole, [wide], "channels_last")
            same = bytes_[0].dtype == np.uint8 and np.allclose(self.scaled(bytes_[:1]), expected, atol=1e-5)
        except (ValueError, TypeError) as error:
            rule = f"its image processor does not take such images ({str(error).splitlines()[0]})"
            raise RequestError(Problem("model.path", path, rule, "another model")) from None
        name = type(self._whole).__name__
        if bytes_[0].shape != bytes_[1].shape:
            rule = f"its image processor ({name}) keeps the shape of each image; a batch needs one"
            raise RequestError(Problem("model.path", path, rule, f"a size with height and width in its {FILE}"))
        if not same:
            rule = f"its image processor ({name}) changes values before it changes sizes, which is not done here"
            raise RequestError(Problem("model.path", path, rule, "another model"))
        return bytes_[0].shape
