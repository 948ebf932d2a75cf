"""The plan of models that do not read one row of tokens: images, an encoder with a decoder, numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tiny import kept_for_backward
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM

from conf.batch import Layout
from conf.compose import compose
from conf.errors import RequestError
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig
from launch.planner.communication import within_a_step
from launch.planner.flops import flops_per_row
from launch.planner.memory import memory
from recipes.models.configuration import check_network
from recipes.models.shape import model_shape

TEXTS = {"vocab_size": 96, "d_model": 32}
BART = {**TEXTS, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "dropout": 0.0}  # fmt: skip
T5 = {**TEXTS, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "dropout_rate": 0.0}
IMAGES = {"image_size": 8, "num_channels": 1}
VIT = {**IMAGES, "patch_size": 2, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
CONVNEXT = {
    **IMAGES,
    "patch_size": 1,
    "num_stages": 2,
    "hidden_sizes": [8, 16],
    "depths": [2, 1],
    "drop_path_rate": 0.0,
}
RESNET = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
ONE_ROW = Config(batch=BatchConfig(1, 1, 1))
FAMILIES = {
    "bart": (AutoModelForSeq2SeqLM, BART, (16,)),
    "t5": (AutoModelForSeq2SeqLM, T5, (16,)),
    "vit": (AutoModelForImageClassification, VIT, (1, 8, 8)),
    "convnext": (AutoModelForImageClassification, CONVNEXT, (1, 8, 8)),
    "resnet": (AutoModelForImageClassification, RESNET, (1, 32, 32)),
}


def shape(family: str, parallel: ParallelConfig | None = None) -> Any:
    hf_class, given, row = FAMILIES[family]
    model = ModelConfig(type=family, config=dict(given))
    return model_shape(model, DataConfig(), "fp32", parallel, hf_class, lambda config: row)


def real(family: str, attention: str | None = None) -> tuple[Any, dict[str, Any]]:
    hf_class, given, row = FAMILIES[family]
    transformers.set_seed(0)
    model = hf_class.from_config(AutoConfig.for_model(family, **given), attn_implementation=attention)
    if len(row) == 3:
        return model, {"pixel_values": torch.zeros(1, *row)}
    ids = torch.zeros(1, *row, dtype=torch.long)
    padded = torch.ones_like(ids)
    padded[0, -1] = 0
    return model, {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": padded, "use_cache": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str) -> None:
    model, inputs = real(family)
    measured = kept_for_backward(model, **inputs)
    planned = memory(shape(family), ONE_ROW, Layout(1, 1), "cpu")
    assert planned.device["activations"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_is_what_torch_counts(family: str) -> None:
    model, inputs = real(family, "eager")  # torch 2.13 counts nothing of its attention on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert flops_per_row(shape(family)) == pytest.approx(3 * counter.get_total_flops())


def test_arithmetic_by_hand() -> None:
    """17 positions of 64: four projections and two matrices a layer, scores and their sums, patches, two classes."""
    layer = 17 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 17 * 17 * 64
    assert shape("vit").counted == 2 * (2 * layer + 16 * 4 * 64 + 64 * 2)


def test_stages_send_what_the_next_one_reads() -> None:
    """The second stage of the network for images reads (8, 8, 8) numbers, and sends their gradients back."""
    parallel, layout = ParallelConfig(pipeline=2), Layout(2, 1, pipeline=2)
    cfg, whole = Config(batch=BatchConfig(4, 2, 2)), shape("convnext", parallel)
    for place, part in enumerate(whole.parts):
        sent = within_a_step(part, whole, cfg, layout, place)
        assert sent == {"pipeline: hidden states": 4 * 8 * 8 * 8 * 4}


def test_tensor_ranks_exchange_what_the_blocks_add_up() -> None:
    """Three blocks: a sum forward and one backward, of (8, 8, 8) numbers in two of them, of (16, 4, 4) in the third."""
    (part,) = shape("convnext", ParallelConfig(tensor=2)).parts
    assert part.traffic.forward == part.traffic.backward == (2 * 8 * 8 * 8 + 16 * 4 * 4) * 4


def test_the_plan_refuses_what_training_refuses() -> None:
    def refused(family: str, more: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        hf_class, given, row = FAMILIES[family]
        cfg = Config(model=ModelConfig(type=family, config={**given, **(more or {})}), batch=BatchConfig(4, 2, 2))
        for key, value in changes.items():
            setattr(cfg.train, key, value)
        with pytest.raises(RequestError) as raised:
            model_shape(
                cfg.model, cfg.data, "fp32", None, hf_class, lambda config: row, partial(check_network, cfg=cfg)
            )
        return [problem.key for problem in raised.value.problems]

    assert refused("resnet") == ["batch.micro_size"], "what it learns would depend on the ranks"
    assert refused("convnext", activation_checkpointing=1) == ["train.activation_checkpointing"]
    assert refused("convnext", compile=True) == ["train.compile"]
    assert refused("bart", {"decoder_layerdrop": 0.1}) == ["model.config.decoder_layerdrop"]


def test_heads_may_differ_from_stage_to_stage() -> None:
    """Swin and LeViT have lists where others have numbers; DeiT has several classes for images."""
    swin = {
        **IMAGES,
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    for family, given, side in (("swin", swin, 32), ("deit", VIT, 8)):
        hf_class, row = AutoModelForImageClassification, (1, side, side)
        found = model_shape(
            ModelConfig(type=family, config=dict(given)),
            DataConfig(),
            "fp32",
            None,
            hf_class,
            lambda config, row=row: row,
        )
        assert found.counted and found.activations


def test_the_t5_of_the_readme_has_the_sizes_that_it_is_given() -> None:
    """5.59M parameters with 320 tokens; its `d_model` was lost to the preset's, and it had 11.17M."""
    sizes = "model.config={d_model: 256, d_kv: 64, d_ff: 1024, num_layers: 3, num_heads: 4}"
    cfg = compose(["+recipe=describe_functions", "model.type=t5", sizes, "data.vocab_size=320"], 1)
    found = model_shape(cfg.model, cfg.data, "fp32", hf_class=AutoModelForSeq2SeqLM)
    assert (found.parameters, found.hidden) == (5_591_552, 256)
