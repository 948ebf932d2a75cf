"""Rows that a model of each task cannot read, or whose targets it cannot give: said, and refused when many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_supervised import config, prepared, refused
from test_what_models_say import translation
from test_what_would_be_wrong import saved
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conf.errors import RequestError
from conf.schema import ModelConfig
from recipes import recipe_class

ENGLISH = "who noticed it first and when was this described by Ann heart art of painting the sleeps here now"
CHINESE = {"question": "谁是第一个发现的人", "context": "第一个发现的人是李明和他的朋友", "answer": "李明"}


@pytest.fixture
def encoder(tmp_path: Path) -> ModelConfig:
    """A pretrained English encoder of words, uncased."""
    folder = tmp_path / "encoder"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator([ENGLISH] * 9, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    ends = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", **names).save_pretrained(folder)
    rows = [{"text": ENGLISH, "label": n % 2} for n in range(8)]
    cfg = config(tmp_path, "sequence_classification", rows, vocab_size=None)
    cfg.model.tokenizer = str(folder)
    saved(prepared(cfg), folder)
    AutoTokenizer.from_pretrained(folder)
    return ModelConfig(path=str(folder))


def of_pretrained(tmp_path: Path, model: ModelConfig, task: str, rows: list[dict[str, Any]], **data: Any) -> Any:
    cfg = config(tmp_path, task, rows, vocab_size=None, **data)
    cfg.model = model
    return cfg


def question(question: str, context: str, answer: str) -> dict[str, Any]:
    return {"question": question, "context": context,
            "answers": {"text": [answer], "answer_start": [context.index(answer)]}}  # fmt: skip


def test_chinese_questions_are_refused_by_an_english_encoder(tmp_path: Path, encoder: ModelConfig) -> None:
    """F1 0.06 without a word, once."""
    cfg = of_pretrained(tmp_path, encoder, "question_answering", [question(*CHINESE.values())] * 12)
    text = refused(cfg)
    assert "unknown to the tokenizer" in text and "data.max_unreadable=0.5" in text
    assert f"{tmp_path}/rows.jsonl:1" in text and "谁是第一个" in text
    cfg.data.max_unreadable = 1.0
    recipe = prepared(cfg)
    assert "unreadable: " in recipe.said() and recipe.report["unreadable"][0]["count"] > 0
    from transformers import AutoModelForQuestionAnswering

    AutoModelForQuestionAnswering.from_pretrained(encoder.path).save_pretrained(encoder.path)  # a head to be judged
    finished = recipe_class(cfg.task)(cfg)
    cfg.data.max_unreadable, finished.finished = 0.5, True
    finished.prepare()  # what is only evaluated is said, not refused
    assert "unreadable: " in finished.said()


def test_questions_that_it_can_read_are_not(tmp_path: Path, encoder: ModelConfig) -> None:
    rows = [question("who noticed it", "this was described by Ann first", "Ann")] * 12
    recipe = prepared(of_pretrained(tmp_path, encoder, "question_answering", rows))
    assert recipe.report["unreadable"] == [] and "unreadable" not in recipe.said()
    assert "new in the model, its weights lack it: qa_outputs.bias, qa_outputs.weight" in recipe.said()


def test_answers_that_no_span_of_tokens_is(tmp_path: Path, encoder: ModelConfig) -> None:
    inside = question("who noticed it", "this was described by heart", "art")
    nothing = question("who noticed it", "this was the heart", "the")
    rows = [question("who noticed it", "this was described by heart", "heart")] * 36
    recipe = prepared(of_pretrained(tmp_path, encoder, "question_answering", [*rows, inside, nothing] * 2))
    shares = {share["what"]: share for share in recipe.report["unreadable"]}
    for what in ("questions whose answer is no span of tokens", "questions of whose answer the metric leaves nothing"):
        share = next(share for name, share in shares.items() if name.startswith(what))
        assert (share["count"], share["of"]) == (2, 76)
    assert "unreadable" not in recipe.said()  # 2.6%
    text = refused(of_pretrained(tmp_path, encoder, "question_answering", [rows[0], *[inside] * 9]))
    assert "90.0% of 10: questions whose answer is no span of tokens" in text and "'art'" in text


def test_translations_that_the_tokenizer_cannot_write(tmp_path: Path, encoder: ModelConfig) -> None:
    cfg = translation(tmp_path)
    cfg.data.vocab_size = None
    cfg.model.tokenizer = encoder.path
    lower = [{"source": "who noticed it", "target": "Ann noticed it"}] * 8  # an uncased tokenizer writes `ann`
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lower))
    assert "100.0% of 8: targets that the tokenizer cannot write" in refused(cfg)
    rows = [{"source": "who noticed it", "target": "painting, of  the heart"}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg.data.max_unreadable = 0.5
    with pytest.raises(RequestError, match="tokens of targets that are unknown"):  # the comma
        cfg.data.max_unreadable = 0.1
        prepared(cfg)
    rows = [{"source": "who noticed it", "target": "painting  of the heart"}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepared(cfg).report["unreadable"] == []


def test_translations_of_a_tokenizer_of_bytes_can_all_be_written(tmp_path: Path) -> None:
    assert prepared(translation(tmp_path)).report["unreadable"] == []


def test_words_of_which_nothing_is_left(tmp_path: Path, encoder: ModelConfig) -> None:
    rows = [{"tokens": ["ann", "\u200b\u0007", "sleeps"], "tags": ["PER", "X", "O"]}] * 8  # BERT takes controls out
    cfg = of_pretrained(tmp_path, encoder, "token_classification", rows)
    (share,) = prepared(cfg).report["unreadable"]
    assert (share["count"], share["of"], share["kind"]) == (8, 24, "unreachable")
    cfg.data.max_unreadable = 0.3
    assert "tokens of which the tokenizer leaves nothing" in refused(cfg)


def test_classified_and_rated_texts_are_measured(tmp_path: Path, encoder: ModelConfig) -> None:
    for task in ("sequence_classification", "regression"):
        rows = [{"text": CHINESE["context"], "label": n % 2} for n in range(12)]
        assert "unknown to the tokenizer" in refused(of_pretrained(tmp_path, encoder, task, rows))
        rows = [{"text": ENGLISH, "label": n % 2} for n in range(12)]
        assert prepared(of_pretrained(tmp_path, encoder, task, rows)).report["unreadable"] == []
