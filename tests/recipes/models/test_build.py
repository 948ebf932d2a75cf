"""Models from scratch: the family's own initialisation, whatever the order; packed documents stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyCausalLM, tiny_config
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)

from conf.errors import RequestError
from recipes.models.attention import keeps_documents_apart
from recipes.models.build import blocks, checkpoint_layers, from_pretrained, from_scratch

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL = {"vocab_size": 301, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
FAMILIES = {
    "llama": {**SHAPE, "tie_word_embeddings": False}, "qwen3": {**SHAPE, "tie_word_embeddings": True}, "gpt2": GPT2,
            "gpt_neox": {**SHAPE}, "opt": {**SHAPE, "ffn_dim": 96, "max_position_embeddings": 64},
    "gemma2": {**SHAPE, "head_dim": 16}}  # fmt: skip


def config(family: str):
    return AutoConfig.for_model(family, **SPECIAL, **FAMILIES[family])


def build(family: str, seed: int = 0, **options):
    return from_scratch(
        AutoModelForCausalLM,
        config(family),
        seed=seed,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=None,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation_is_the_familys_own(family: str) -> None:
    set_seed(0)
    plain = AutoModelForCausalLM.from_config(config(family))
    ours = build(family)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert mine.mean().item() == pytest.approx(theirs.mean().item(), abs=0.01), name
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.15, abs=1e-6), name
    for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_values_depend_on_the_seed_and_nothing_else() -> None:
    first, again, other = build("llama"), build("llama"), build("llama", seed=1)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, first.model.layers[1].mlp.up_proj.weight)
    build("llama")
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator was moved"


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "tie_word_embeddings": False}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
ENCODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHERS = {
    "t5": (AutoModelForSeq2SeqLM, T5), "mt5": (AutoModelForSeq2SeqLM, T5), "umt5": (AutoModelForSeq2SeqLM, T5),
    "bart": (AutoModelForSeq2SeqLM, BART), "marian": (AutoModelForSeq2SeqLM, {**BART, "decoder_vocab_size": None}),
    "bert": (AutoModelForSequenceClassification, ENCODER), "roberta": (AutoModelForTokenClassification, ENCODER),
    "modernbert": (AutoModelForTokenClassification, {**ENCODER, "pad_token_id": 0}),
    "deberta-v2": (AutoModelForQuestionAnswering, ENCODER), "vit": (AutoModelForImageClassification, ENCODER),
    "convnext": (AutoModelForImageClassification, {"depths": [1, 1, 1, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_what_is_placed_is_final(family: str) -> None:
    """T5 initialises its embedding and head from the whole model: they are not sharded before that."""
    hf_class, given = OTHERS[family]
    special = {"pad_token_id": 0, "decoder_start_token_id": 0} if hf_class is AutoModelForSeq2SeqLM else {}
    if family not in ("vit", "convnext"):
        special |= {"vocab_size": 301}
    made = AutoConfig.for_model(family, **{**special, **given})
    options = {"seed": 0, "dtype": torch.float32, "device": torch.device("cpu"), "attention": None}
    seen = []
    placed = from_scratch(hf_class, made, **options, place=lambda part: seen.extend((p, p.clone()) for p in part))
    assert sorted(id(p) for p, _ in seen) == sorted(id(p) for p in placed.parameters())
    assert all(torch.equal(parameter, value) for parameter, value in seen)
    whole = from_scratch(hf_class, made, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), placed.parameters(), strict=True))


HEADS = {
    "t5": (AutoModelForSequenceClassification, T5), "bart": (AutoModelForQuestionAnswering, BART),
    "modernbert": (AutoModelForSequenceClassification, {**ENCODER, "pad_token_id": 0}),
    "bert": (AutoModelForSequenceClassification, ENCODER), "roberta": (AutoModelForTokenClassification, ENCODER),
    "deberta-v2": (AutoModelForSequenceClassification, ENCODER), "gpt2": (AutoModelForTokenClassification, GPT2),
}  # fmt: skip


@pytest.mark.parametrize("family", HEADS)
def test_a_new_head_begins_as_the_family_has_it(family: str, tmp_path: Path) -> None:
    """T5 initialises a classifier from its head: layer by layer its weights would be eight times as large."""
    hf_class, given = HEADS[family]
    special = {"vocab_size": 301, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "num_labels": 3}
    made = AutoConfig.for_model(family, **{**special, **given})
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None}
    base = from_scratch(AutoModel, made, seed=1, **settings)
    base.save_pretrained(tmp_path)
    seen = []
    found = from_pretrained(
        hf_class, tmp_path, config=made, new_head_seed=0, **settings,
        place=lambda part: seen.extend((p, p.clone()) for p in part),
    )  # fmt: skip
    whole = from_scratch(hf_class, made, seed=0, **settings)
    prefix, kept = f"{found.base_model_prefix}.", dict(base.named_parameters())
    for name, parameter in found.named_parameters():
        loaded = kept.get(name.removeprefix(prefix))
        assert torch.equal(parameter, whole.get_parameter(name) if loaded is None else loaded), name
    assert sorted(id(p) for p, _ in seen) == sorted(id(p) for p in found.parameters())
    assert all(torch.equal(parameter, value) for parameter, value in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_more_than_one_block_is_whole(family: str) -> None:
    """`place` may shard what it gets: each parameter comes by exactly once, no two blocks at a time."""
    seen: list[int] = []
    largest = 0

    def place(parameters):
        nonlocal largest
        largest = max(largest, sum(p.numel() for p in parameters))
        seen.extend(id(p) for p in parameters)

    model = build(family, place=place)
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    assert largest < sum(p.numel() for p in model.parameters()) / 2


def test_blocks_are_layers_and_what_is_around_them() -> None:
    names = [name for name, _ in blocks(build("llama"))]
    assert names.index("model.layers.0") < names.index("model") < names.index("")
    assert "model.layers.0.mlp" not in names and "model.layers" not in names


@pytest.mark.parametrize("every, expected", [(0, [False] * 3), (1, [True] * 3), (2, [True, False, True])])
def test_activation_checkpointing_of_every_nth_layer(every: int, expected: list[bool]) -> None:
    model = build("llama")
    checkpoint_layers(model, every)
    assert [bool(layer.gradient_checkpointing) for layer in model.model.layers] == expected


@pytest.mark.parametrize(
    "family, apart",
    [("llama", True), ("qwen3", True), ("gpt2", True), ("gemma2", True), ("bloom", False), ("mamba", False)],
)
def test_families_that_mix_packed_documents_are_noticed(family: str, apart: bool) -> None:
    if family in FAMILIES:
        model = build(family)
    else:
        shape = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=301, **shape))
    assert keeps_documents_apart(model.eval(), torch.device("cpu")) is apart


def test_packed_documents_get_the_logits_they_have_alone() -> None:
    recipe = TinyCausalLM(tiny_config(1, 1, 1))
    recipe.prepare()
    model = build("llama").eval()
    row = recipe.train.row(3)
    ids, positions = torch.tensor(row["input_ids"])[None], torch.tensor(row["position_ids"])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        cut = int(np.flatnonzero(row["position_ids"] == 0)[1])
        for part in (slice(0, cut), slice(cut, None)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits[0]
            torch.testing.assert_close(packed[part], alone, rtol=1e-5, atol=1e-5)


def test_a_head_that_the_weights_lack_is_never_made_up(tmp_path: Path) -> None:
    """Neither a missing one nor one for another number of classes: its scores would be those of chance."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, num_labels=3, **size)
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None}
    BertModel(config).save_pretrained(tmp_path / "headless")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(RequestError, match="its weights lack classifier"):
        from_pretrained(AutoModelForSequenceClassification, tmp_path / "headless", config=config, **settings)
    config.num_labels = 5
    with pytest.raises(RequestError, match=r"its weights lack classifier.* in this shape"):
        from_pretrained(AutoModelForSequenceClassification, tmp_path / "whole", config=config, **settings)
    config.num_labels = 3
    from_pretrained(AutoModelForSequenceClassification, tmp_path / "whole", config=config, **settings)


@pytest.mark.parametrize(("family", "table"), [("bert", "embeddings.word_embeddings"), ("bart", "shared")])
def test_padding_that_is_also_the_end_of_text_learns(family: str, table: str, tmp_path: Path) -> None:
    """torch keeps the row of `padding_idx` at zero and without gradient: whatever ends a text would mean nothing."""
    shape = {"bert": SHAPE, "bart": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}}[family]
    special = {"vocab_size": 301, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wanted = AutoConfig.for_model(family, **special, **shape)
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None}
    new = from_scratch(AutoModel, wanted, seed=0, **settings)
    new.save_pretrained(tmp_path)
    for model in (new, from_pretrained(AutoModel, tmp_path, **settings)):
        rows = model.get_submodule(table).weight
        assert rows[0].std() > 0.5 * rows[1:].std()
        model(torch.tensor([[5, 0, 7]])).last_hidden_state.pow(3).sum().backward()
        assert rows.grad[0].norm() > 0


@pytest.mark.parametrize("family", ("clip", "siglip"))
def test_only_a_head_can_be_new_where_the_class_does_not_name_its_base(family: str, tmp_path: Path) -> None:
    """CLIPForImageClassification says `clip` and keeps its base model in `vision_model`."""
    from safetensors.torch import load_file, save_file

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    images, texts = {**size, "image_size": 8, "patch_size": 4, "projection_dim": 8}, {**size, "vocab_size": 32}
    config = AutoConfig.for_model(family, vision_config=images, text_config=texts)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": None, "new_head_seed": 0}
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("classifier")}
    save_file(weights, file, metadata={"format": "pt"})
    from_pretrained(AutoModelForImageClassification, tmp_path, **settings)
    weights.pop(next(name for name in weights if "layers.1" in name))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"its weights lack vision_model.encoder.layers.1"):
        from_pretrained(AutoModelForImageClassification, tmp_path, **settings)


def test_buffers_are_where_the_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepspeed 0.19.8 moves nothing of a model that ZeRO-3 has sharded: they would stay on the host."""
    from recipes.models import build as module

    model = build("llama")
    assert dict(model.named_buffers())
    moved = module._on_device(model, torch.device("meta"))
    assert {buffer.device.type for _, buffer in moved.named_buffers()} == {"meta"}
    assert {parameter.device.type for parameter in moved.parameters()} == {"cpu"}
    seen: list[str] = []
    monkeypatch.setattr(module, "_on_device", lambda model, device: seen.append(str(device)) or model)
    build("llama", place=lambda parameters: None)
    assert seen == ["cpu"]
