"""Recipes of well-known data sets, on a few rows with the columns and files that these data sets have."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.compose import compose
from recipes import recipe_class

ROWS = 24
CLASSES: dict[str, list[str]] = {
    "ag_news": ["World", "Sports", "Business", "Sci/Tech"],
    "financial_phrases": ["negative", "neutral", "positive"],
}
CONTEXT = "The tower was built in 1889 by a company."
ANSWERED = {"text": ["1889"], "answer_start": [23]}
PAIRS = [{"fr": f"la maison {number}", "en": f"the house {number}"} for number in range(ROWS)]
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "ag_news": {"text": [f"news {number}" for number in range(ROWS)], "label": [n % 4 for n in range(ROWS)]},
    "financial_phrases": {
        "sentiment": ["-"] * ROWS, "sentence": [f"sales {n}" for n in range(ROWS)],
        "label": [n % 3 for n in range(ROWS)],
    },
    "squad_v2": {
        "id": [str(number) for number in range(ROWS)], "title": ["Tower"] * ROWS, "context": [CONTEXT] * ROWS,
        "question": ["When was it built?", "Who lives there?"] * (ROWS // 2),
        "answers": [ANSWERED, {"text": [], "answer_start": []}] * (ROWS // 2),
    },
    "wmt14": {"translation": PAIRS},
}  # fmt: skip
SPLITS = {"ag_news": "test", "financial_phrases": "validation", "squad_v2": "validation", "wmt14": "validation"}


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe `name` with a small new model, its rows read and encoded."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def prepare(name: str, *overrides: str) -> Any:
        shape = (
            [] if name == "mnist" else [f"model={'bart_8m' if name == 'wmt14' else 'bert_4m'}", "data.vocab_size=300"]
        )
        small = ["batch.global_size=8", f"data.cache_dir={tmp_path}", *shape]
        cfg = compose([f"+recipe={name}", *small, *overrides], 1)
        recipe = recipe_class(cfg.task)(cfg)
        assert recipe.check() == []
        recipe.prepare()
        return recipe

    return prepare


@pytest.mark.parametrize("name", COLUMNS)
def test_hub_data_sets(name: str, prepared: Any, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    rows = Dataset.from_dict(COLUMNS[name])
    if name in CLASSES:
        rows = rows.cast_column("label", ClassLabel(names=CLASSES[name]))
    (tmp_path / name).mkdir()
    for split in ("train", SPLITS[name]):
        rows.to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    subset = ["data.subset=null"] if name == "wmt14" else []
    recipe = prepared(name, f"data.name={tmp_path / name}", *subset)
    assert (len(recipe.train), len(recipe.held_out)) == (ROWS, ROWS)
    assert sorted(recipe.labels) == sorted(CLASSES.get(name, []))


def test_conll2003(prepared: Any, tmp_path: Path) -> None:
    """Four columns, document lines between; entities are in the last column."""
    sentence = "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\ncall NN I-NP O\n\n"
    for name, count in (("eng.train", 10), ("eng.testa", 5)):
        (tmp_path / name).write_text("-DOCSTART- -X- -X- O\n\n" + sentence * count)
    files = [f"data.path={tmp_path / 'eng.train'}", f"data.eval_path={tmp_path / 'eng.testa'}"]
    recipe = prepared("conll2003", *files)
    assert recipe.labels == ["B-MISC", "B-ORG", "O"] and len(recipe.train) == 10


def test_mnist(prepared: Any, tmp_path: Path) -> None:
    """Images of 28×28 and their labels, gzip; all ten digits occur."""
    overrides = []
    for part, prefix, grey in (("train", "", 0), ("t10k", "eval_", 9)):
        images, labels = np.full((20, 28, 28), grey, np.uint8), np.arange(20, dtype=np.uint8) % 10
        parts = (("path", "images-idx3", struct.pack(">IIII", 2051, *images.shape), images),
                 ("target_path", "labels-idx1", struct.pack(">II", 2049, 20), labels))  # fmt: skip
        for key, kind, header, values in parts:
            file = tmp_path / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + values.tobytes()))
            overrides.append(f"data.{prefix}{key}={file}")
    recipe = prepared("mnist", *overrides)
    assert recipe.labels == [str(digit) for digit in range(10)]
    batch = recipe.collate([recipe.train.row(0)], 2)
    assert batch["pixel_values"].shape == (2, 1, 28, 28)
    assert recipe.row_shape(recipe.model_config()) == (1, 28, 28), "what the plan counts"


def test_images_of_the_hub(prepared: Any, tmp_path: Path) -> None:
    """MNIST as the hub has it: a column of PNG files, and one of classes with names."""
    from datasets import ClassLabel, Dataset, Features, Image

    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (28, 28), np.uint8) for _ in range(20)]
    names = [str(digit) for digit in range(10)]
    content = {"image": [png(picture) for picture in pictures], "label": [number % 10 for number in range(20)]}
    rows = Dataset.from_dict(content, features=Features({"image": Image(), "label": ClassLabel(names=names)}))
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    recipe = prepared("mnist", "data=hub", f"data.name={tmp_path / 'hub'}", "data.eval_split=test")
    assert recipe.labels == names and (len(recipe.train), len(recipe.held_out)) == (20, 20)
    read = {recipe.train.row(number)["pixels"].tobytes() for number in range(20)}
    assert read == {picture.tobytes() for picture in pictures}


def png(picture: np.ndarray) -> dict[str, Any]:
    """As the column of a data set has it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}
