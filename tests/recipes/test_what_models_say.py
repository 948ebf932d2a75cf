"""What a model's own files say or leave out, and what is said of its data: tokens, segments, settings, classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_supervised import TEXTS, config, prepared, refused
from test_what_would_be_wrong import saved
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertTokenizer,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    T5ForConditionalGeneration,
)

from conf.errors import RequestError
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig
from recipes import recipe_class
from recipes.data.image_processor import ImageProcessor
from recipes.data.tokenizer import load_tokenizer
from recipes.models.configuration import check_buildable, scratch_config
from recipes.scores import translation_scores
from recipes.translation import _asked_for_alone

LINES = [{"source": f"a cat {n}", "target": f"un chat {n}"} for n in range(16)]
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def translation(tmp_path: Path, kind: str = "bart", **data: Any) -> Config:
    cfg = config(tmp_path, "translation", LINES, **data)
    cfg.model = ModelConfig(type=kind, config=BART if kind == "bart" else LLAMA)
    return cfg


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "deberta-v2", "t5"])
def test_a_model_without_its_tokenizer(family: str, tmp_path: Path) -> None:
    """transformers 5.23 makes an empty one, for which every text is unknown."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_model_without_its_image_processor(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no preprocessor_config\.json"):
        ImageProcessor.of_model(tmp_path, AutoConfig.for_model("vit"), str(tmp_path))


def test_only_what_is_asked_for_decides_what_is_generated() -> None:
    """transformers 5.23 takes what a call does not say from the model: one beam would not be greedy."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    own = GenerationConfig(repetition_penalty=9.0, min_length=8, no_repeat_ngram_size=1, decoder_start_token_id=0,
                           eos_token_id=1, pad_token_id=0)  # fmt: skip
    model.generation_config = own
    assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), greedy)
    with _asked_for_alone(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), greedy)
    assert model.generation_config is own


def test_an_albert_is_told_the_segments(tmp_path: Path) -> None:
    """Its tokenizer (transformers 5.23) knows them, and does not say them unasked."""
    words = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "▁a", "▁b", *"abcdefghij "]
    AlbertTokenizer(vocab=[(word, -float(n)) for n, word in enumerate(words)]).save_pretrained(tmp_path / "albert")
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AlbertForSequenceClassification(
        AlbertConfig(vocab_size=24, intermediate_size=16, max_position_embeddings=64, **sizes)
    ).save_pretrained(tmp_path / "albert")
    rows = [{"text": "a", "other": "b", "label": n % 2} for n in range(16)]
    cfg = config(tmp_path, "sequence_classification", rows, pair="other", vocab_size=None)
    cfg.model = ModelConfig(path=str(tmp_path / "albert"))
    recipe = prepared(cfg)
    kinds = recipe.collate([recipe.train.row(0)], 1)["token_type_ids"][0]
    assert sorted(set(kinds.tolist())) == [0, 1]
    recipe.save_processor(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")("a", "b")
    assert again["token_type_ids"] == recipe.train.row(0)["token_type_ids"].tolist()


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "fnet"])
def test_a_family_whose_answers_depend_on_padding(family: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, "sequence_classification", TEXTS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    cfg.model = ModelConfig(type=family, config=sizes if family == "fnet" else {**sizes, "num_attention_heads": 2})
    recipe = prepared(cfg)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(recipe.model_config()).eval()
    if family == "fnet":
        with pytest.raises(RequestError, match="depends on the padding"):
            recipe.adopt(model)
    else:
        recipe.adopt(model)


def test_networks_that_normalise_over_a_micro_batch() -> None:
    """Their running means differ from rank to rank, and so would predictions."""
    made = scratch_config("resnet", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "embedding_size": 8})
    whole, parts = Config(batch=BatchConfig(8, 8, 1)), Config(batch=BatchConfig(8, 4, 2))
    assert check_buildable(AutoModelForImageClassification, made, whole) == []
    (problem,) = check_buildable(AutoModelForImageClassification, made, parts)
    assert problem.key == "batch.micro_size" and "convnext" in problem.nearest
    assert check_buildable(AutoModelForImageClassification, made, parts, trained=False) == []


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_a_saved_tokenizer_ends_a_source_as_training_did(kind: str, tmp_path: Path) -> None:
    """It is the sign to begin: without it a decoder goes on with the source."""
    recipe = prepared(translation(tmp_path, kind))
    recipe.save_processor(tmp_path / "saved")
    ids = AutoTokenizer.from_pretrained(tmp_path / "saved")(LINES[0]["source"])["input_ids"]
    sources = [recipe.held_out.row(n)["input_ids"].tolist() for n in range(len(recipe.held_out))]
    sources += [recipe.train.row(n)["input_ids"].tolist() for n in range(len(recipe.train))]
    assert ids in sources and ids[-1] == recipe.tokenizer.eos_token_id != ids[-2]


def test_a_model_that_is_told_what_to_do(tmp_path: Path) -> None:
    """A T5 translates when it is asked to: evaluated without the words of its training it would fail unseen."""
    recipe = prepared(translation(tmp_path, source_prefix="translate: "))
    text = recipe.tokenizer.decode(recipe.train.row(0)["input_ids"], skip_special_tokens=True)
    assert text.startswith("translate: a cat")
    folder = saved(recipe, tmp_path / "model")
    cfg = translation(tmp_path, source_prefix="translate: ", vocab_size=None)
    cfg.model = ModelConfig(path=str(folder))
    tuned = saved(prepared(cfg), tmp_path / "tuned")
    for prefix, right in (("", False), ("translate: ", True)):
        cfg = translation(tmp_path, source_prefix=prefix, vocab_size=None)
        cfg.model = ModelConfig(path=str(tuned))
        recipe = recipe_class("translation")(cfg)
        recipe.finished = True
        if right:
            recipe.prepare()
        else:
            with pytest.raises(RequestError, match=r"'data\.source_prefix=\"translate: \"'"):
                recipe.prepare()


def test_bleu_of_texts_without_spaces(tmp_path: Path) -> None:
    told, right = ["我喜欢在公园里吃大苹果"], ["我很喜欢在公园里吃大苹果"]
    assert translation_scores(told, right)["bleu"] < 1 < 50 < translation_scores(told, right, "zh")["bleu"]
    rows = [{"source": f"a {n}", "target": "我喜欢在公园里吃苹果"} for n in range(16)]
    cfg = translation(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "eval.bleu_tokens=zh" in prepared(cfg).said()
    cfg.eval.bleu_tokens = "zh"
    assert "bleu_tokens" not in prepared(cfg).said()


@pytest.mark.parametrize(("label", "rule"), [("['a', 'b']", "looks like a list"), ("a,b", "taken for one class")])
def test_several_classes_written_as_one(label: str, rule: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": [label, "a", "b"][n % 3]} for n in range(18)]
    cfg = config(tmp_path, "sequence_classification", rows, multi_label=True)
    assert rule in refused(cfg) and "a|" in refused(cfg)


def test_what_the_log_says_of_classes(tmp_path: Path) -> None:
    """A mark for "no label" would show there as a class."""
    said = prepared(config(tmp_path, "sequence_classification", TEXTS)).said()
    assert "classes: " in said


def test_marks_of_libraries_are_no_tags(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": [0, -100 if n == 5 else 1]} for n in range(16)]
    message = refused(config(tmp_path, "token_classification", rows))
    assert "rows.jsonl:6" in message and "-100" in message


def test_conllu(tmp_path: Path) -> None:
    """Ten columns, of which the first numbers the words; "del" stands for the two that follow it."""
    lines = ["1\tel\t_\tDET", "2-3\tdel\t_\t_", "2\tde\t_\tADP", "3\tel\t_\tDET"]
    sentence = "".join(line + "\t_" * 6 + "\n" for line in lines)
    (tmp_path / "x.conllu").write_text((sentence + "\n") * 12)
    cfg = config(tmp_path, "token_classification", TEXTS)
    cfg.data = DataConfig(kind="conll", path=str(tmp_path / "x.conllu"), cache_dir=str(tmp_path / "cache"),
                          vocab_size=300, seq_length=32, held_out=0.25)  # fmt: skip
    (problem,) = recipe_class(cfg.task)(cfg).check()
    assert problem.nearest == "data.tokens=1 data.label=3"
    cfg.data.tokens, cfg.data.label = "1", "3"
    recipe = prepared(cfg)
    assert recipe.labels == ["ADP", "DET"] and "12 words that stand for others" in recipe.said()


def test_answers_that_are_too_long_to_be_predicted(tmp_path: Path) -> None:
    context = "abcdefgh" * 5
    rows = [{"question": "x", "context": context, "answers": {"text": [context], "answer_start": [0]}}] * 12
    said = prepared(config(tmp_path, "question_answering", rows, seq_length=64, vocab_size=257)).said()
    assert "12 answers of more than 30 tokens" in said
