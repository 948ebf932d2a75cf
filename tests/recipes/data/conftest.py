"""Real data beside the checkout, a small tokenizer, and a way to write data files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from conf.schema import DataConfig
from recipes.data.tokenizer import train_tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def shared():
    """Path of a real data file, or a skip."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"the real data set {name} is not beside the checkout ({SHARED})")
        return SHARED / name

    return path


@pytest.fixture(scope="session")
def tokenizer():
    """512 entries, trained on a few lines; byte-level, so it encodes anything."""
    return train_tokenizer(
        ["the quick brown fox jumps over the lazy dog\n" * 20, "def f(x):\n    return x\n" * 20], 320
    )


@pytest.fixture
def chat_tokenizer():
    """The same kind with a ChatML template and its end token."""
    tokenizer = train_tokenizer(["hello there, what is the time? It is noon.\n" * 20], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """write(name, rows or text or bytes) → path; `.jsonl` from a list of objects, `.gz` compressed."""

    def write(name: str, content: list | str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture
def config(tmp_path):
    """A data configuration with a cache of its own."""

    def config(**keys) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), "seq_length": 32, "held_out": 0.2} | keys)

    return config
