"""Tiny models and rows for tests of the machinery: real recipes, no files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from conf.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainConfig,
)
from recipes.causal_lm import CausalLM
from recipes.models.build import from_scratch

VOCABULARY, LENGTH = 61, 12
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


class RandomRows:
    """Rows of random tokens in which very unequal numbers are supervised: the case that a mean of means gets wrong.

    `uneven` rows are 5 to 12 tokens long.
    """

    def __init__(self, size: int, seed: int = 0, uneven: bool = False):
        self.size, self.seed, self.uneven = size, seed, uneven

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng([self.seed, index % self.size])
        ids = draw.integers(0, VOCABULARY, LENGTH)
        labels = draw.integers(0, VOCABULARY, LENGTH)
        labels[draw.permutation(LENGTH)[: draw.integers(0, LENGTH)]] = -100
        cut = int(draw.integers(1, LENGTH))
        positions = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])
        row = {"input_ids": ids, "labels": labels, "position_ids": positions, "attended": np.ones(LENGTH, bool)}
        return {name: values[: LENGTH - index % 8] for name, values in row.items()} if self.uneven else row


class _Tokenizer:
    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self) -> int:
        return VOCABULARY

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(VOCABULARY)}

    def save_pretrained(self, folder) -> None:
        pass


class TinyCausalLM(CausalLM):
    """The real recipe over random rows."""

    def prepare(self, progress=None) -> None:
        self._folder, self.tokenizer = None, _Tokenizer()
        uneven = self.cfg.data.packing == "none"
        self.train, self.held_out = RandomRows(64, uneven=uneven), RandomRows(13, seed=1, uneven=uneven)


def tiny_config(micro: int, accumulation: int, world: int, **model: object) -> Config:
    """A complete configuration of a tiny Llama; `model` overrides its transformers configuration."""
    return Config(
        model=ModelConfig(type="llama", config={**LLAMA, **model}),
        data=DataConfig(seq_length=LENGTH),
        batch=BatchConfig(global_size=micro * accumulation * world, micro_size=micro, accumulation=accumulation),
        train=TrainConfig(steps=5),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, gradient_clipping=0.5),
        scheduler=SchedulerConfig(name="constant"),
        eval=EvalConfig(micro_size=2),
    )


def plain_model(recipe: CausalLM) -> PreTrainedModel:
    """The recipe's model without any engine: fp32, on this process alone."""
    cpu = torch.device("cpu")
    return from_scratch(
        recipe.hf_class(), recipe.model_config(), seed=0, dtype=torch.float32, device=cpu, attention=None
    )


def kept_for_backward(model: PreTrainedModel, **inputs: Any) -> int:
    """Bytes that autograd keeps of one forward pass of the base model; parameters are there anyway."""
    known = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage  # held, so that its address is not given away again
            kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().base_model(**inputs)
    return kept
