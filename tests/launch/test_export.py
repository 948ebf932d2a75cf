"""launch/export.py: a trained model in another dtype and with other shards; its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import EXPORT, environment, run
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.slow
IDS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=301, tie_word_embeddings=True, **shape)
    folder = tmp_path_factory.mktemp("run") / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder.parent


def export(tmp_path: Path, *arguments: object):
    return run([sys.executable, EXPORT, *arguments], tmp_path, environment(tmp_path / "cache"))


def test_shards_hold_the_same_model(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharded"
    from launch.runtime.export import convert

    convert(trained / "model", out, None, shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / "model.safetensors.index.json").exists()
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f)(IDS).logits for f in (trained / "model", out))
    assert torch.equal(a, b)


def test_another_dtype(trained: Path, tmp_path: Path) -> None:
    done = export(tmp_path, trained, "out=small", "dtype=bf16")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    full = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert model.dtype == torch.bfloat16
    for mine, theirs in zip(model.parameters(), full.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere", "out=x"], "no such folder"),
        (["{run}"], "must be named"),
        (["{run}", "out=x", "dtype=int4"], "dtype=bf16"),
        (["{run}", "out=x", "shrd_mb=3"], "shard_mb"),
        (["{run}", "out=x", "shard_mb=0"], "positive"),
        (["{run}", "out={run}"], "never overwritten"),
        (["{empty}", "out=x"], "holds no exported model"),
    ],
)
def test_wrong_requests_write_nothing(trained: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    done = export(tmp_path, *(a.format(run=trained, empty=tmp_path / "empty") for a in arguments))
    assert done.returncode == 2 and done.stderr.startswith("error:") and said in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()
