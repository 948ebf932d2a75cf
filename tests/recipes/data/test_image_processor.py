"""A model's images are those of its own image processor, whatever that does with them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conf.errors import RequestError
from recipes.data.image_processor import FILE, ImageProcessor

COLOURS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "resized": {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 16}, **COLOURS},
    "an old file": {"feature_extractor_type": "ViTFeatureExtractor", "size": 12, **COLOURS},
    "cropped": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}, "resample": 3,
        "crop_size": {"height": 12, "width": 12}, "do_center_crop": True, **COLOURS,
    },
    "cropped by share": {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 12}, "crop_pct": 0.875, **COLOURS,
    },
    "blue first": {
        "image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": True,
        "crop_size": {"height": 12, "width": 12}, "do_flip_channel_order": True,
    },
    "scaled twice": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 12, "width": 12}, **COLOURS,
    },
    "not normalised": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, "do_normalize": False,
    },
}  # fmt: skip


def written(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / FILE).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", PROCESSORS)
def test_both_halves_are_the_processor_of_the_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoImageProcessor

    ours = ImageProcessor.of_model(written(tmp_path, PROCESSORS[name]), SimpleNamespace(image_size=99), "m")
    theirs = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    draw = np.random.default_rng(1)
    for size in ((30, 50, 3), (50, 30, 3), (7, 9, 3), (12, 12, 1)):
        image = draw.integers(0, 256, size, np.uint8)
        sized = ours.sized(image)
        assert sized.dtype == np.uint8 and sized.shape == ours.shape
        expected = theirs(images=[image.repeat(3 // size[2], axis=2)], input_data_format="channels_last")
        np.testing.assert_allclose(ours.scaled([sized])[0], expected["pixel_values"][0], atol=1e-5)
    ours.save(tmp_path / "saved")
    again = ImageProcessor.of_model(tmp_path / "saved", None, "m")
    assert again.settings() == ours.settings() and again.shape == ours.shape


def test_the_processor_of_a_model_that_takes_more_than_images(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSORS["cropped"]}))
    ours = ImageProcessor.of_model(tmp_path, SimpleNamespace(image_size=99), "m")
    assert ours.shape == (3, 12, 12)


def test_a_new_model_resizes_to_its_size(tmp_path: Path) -> None:
    grey = ImageProcessor.of_model(None, SimpleNamespace(image_size=8, num_channels=1), "vit")
    assert grey.shape == (1, 8, 8)
    image = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1)
    np.testing.assert_array_equal(grey.sized(image)[0], image[:, :, 0])
    scaled = grey.scaled([grey.sized(image)])
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled[0, 0], (image[:, :, 0] / 255 - 0.5) / 0.5, atol=1e-6)
    assert ImageProcessor.of_model(None, SimpleNamespace(image_size=(8, 6)), "vit").shape == (3, 8, 6)


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        (None, SimpleNamespace(image_size=8), "there is no preprocessor_config.json beside it"),
        ({"image_processor_type": "NoSuchProcessor"}, None, "its image processor cannot be loaded"),
        ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": False},
         None, "keeps the shape of each image"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 9, "width": 9}, "image_mean": [0.5] * 4},
         None, "its image processor does not take such images"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(tmp_path: Path, settings: Any, config: Any, expected: str) -> None:
    if settings:
        written(tmp_path, settings)
    with pytest.raises(RequestError) as refused:
        ImageProcessor.of_model(tmp_path, config, "some/model")
    assert expected in str(refused.value) and "some/model" in str(refused.value)


def test_the_size_for_a_family_whose_configuration_has_none() -> None:
    """BiT takes images of any size: `data.image_size` says which, and has no effect nowhere else."""
    bit, vit = SimpleNamespace(num_channels=1), SimpleNamespace(image_size=8, num_channels=1)
    assert ImageProcessor.of_model(None, bit, "bit", 28).shape == (1, 28, 28)
    for source, config, asked, says in (
        (None, bit, None, "data.image_size=null: bit takes images of any size"),
        (None, vit, 9, "model.config.image_size=9 data.image_size=null"),
        ("some/folder", bit, 28, "data.image_size=28"),
    ):
        with pytest.raises(RequestError) as refused:
            ImageProcessor.of_model(source, config, "bit" if config is bit else "vit", asked)
        assert says in str(refused.value), str(refused.value)
