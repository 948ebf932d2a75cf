"""A model in fp8: every layout begins at the values that its weights stand for, and exports them as plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import TRAIN, environment, launcher, run
from safetensors.torch import load_file, save_file
from support.tiers import THOROUGH
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.data.tokenizer import train_tokenizer

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "sharded": (2, ("zero=stage3",)),
    **({"plain": (1, ()), "tensor": (2, ("parallel.tensor=2",))} if THOROUGH else {}),
}
"""Name → (ranks, overrides)."""
OVERRIDES = (
    "+recipe=quickstart", "model=pretrained", "model.path=model", "data=text", "data.path=text.txt",
    "data.seq_length=32", "batch.global_size=4", "batch.micro_size=2", "train.steps=2", "scheduler.warmup_steps=1",
    "optimizer.lr=1e-12", "eval.prompt=null",
)  # fmt: skip


def in_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """A small Llama with a scale for each linear layer; returns the values of its weights."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=320)).save_pretrained(folder)
    train_tokenizer(["a b c"] * 4, 260).save_pretrained(folder)
    file = folder / "model.safetensors"
    values = load_file(file)
    stored = dict(values)
    for name in [name for name in values if "proj" in name]:
        scale = values[name].abs().max() / 448
        stored[name] = (values[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        values[name] = stored[name].float() * scale
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_fp8_are_trained_and_exported_as_plain_ones(tmp_path: Path, layout: str) -> None:
    values = in_fp8(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b c d e f g\n\n" * 600)
    ranks, overrides = LAYOUTS[layout]
    command = [*launcher("torchrun", ranks), TRAIN, *OVERRIDES, *overrides]
    done = run(command, tmp_path, environment(tmp_path / "cache"), timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    exported = tmp_path / "runs/quickstart/model"
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    # The rate moves each weight by 1e-12 a step at most: far below a step of fp8.
    torch.testing.assert_close(load_file(exported / "model.safetensors"), values, rtol=0, atol=1e-10)
