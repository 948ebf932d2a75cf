"""What would train, and be wrong without a word: labels, numbers and ends of texts that are not what they seem."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_supervised import TEXTS, config, prepared, refused
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPTNeoXTokenizer,
    MarianTokenizer,
    PreTrainedTokenizerFast,
)

from conf.errors import RequestError
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig, SourceConfig
from conf.weight_files import single_file
from launch.evaluate import _seen
from launch.runtime.export import convert
from launch.runtime.session import _kept
from recipes import recipe_class
from recipes.data.classes import order_of_classes
from recipes.data.hub import HubSource
from recipes.data.numbers import read_number
from recipes.data.rows import Meter, Problems, Row
from recipes.data.tokenizer import END_OF_TEXT, add_ends, save_tokenizer, spaces_are_of_words, train_tokenizer
from recipes.models.attention import check_padding
from recipes.models.pretrained import WANTED, local_folder
from recipes.scores import classification_scores

TASK = "sequence_classification"


def saved(recipe: Any, folder: Path) -> Path:
    """The recipe's model without training."""
    recipe.hf_class().from_config(recipe.model_config()).save_pretrained(folder)
    recipe.save_processor(folder)
    return folder


def test_the_saved_tokenizer_reads_a_text_as_training_did(tmp_path: Path) -> None:
    for task, pair in ((TASK, None), (TASK, "text"), ("token_classification", None)):
        words = [{**row, "tokens": row["text"].split(), "tags": ["A", "B"]} for row in TEXTS]
        recipe = prepared(config(tmp_path, task, words, pair=pair))
        recipe.save_processor(tmp_path / "saved")
        text = TEXTS[0]["text"]
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")(*[text] * (2 if pair else 1))
        assert again["input_ids"] == recipe.held_out.row(0)["input_ids"].tolist()


def test_of_two_texts_the_longer_one_is_cut(tmp_path: Path) -> None:
    rows = [{"text": "long " * 40, "other": ["yes", "no"][n % 2], "label": n % 2} for n in range(16)]
    recipe = prepared(config(tmp_path, TASK, rows, pair="other", seq_length=16))
    ids = [recipe.held_out.row(0)["input_ids"], recipe.train.row(0)["input_ids"]]
    assert all(len(row) == 16 and (row == recipe.tokenizer.eos_token_id).sum() == 3 for row in ids)
    other = [recipe.tokenizer.decode(row[:-1]).rpartition("<|endoftext|>")[2] for row in ids]
    assert set(other) <= {"yes", "no"}


def test_classes_that_are_written_as_zeros_and_ones(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": [n % 2, 1, 0, 1]} for n in range(16)]
    assert "has a class twice" in refused(config(tmp_path, TASK, rows, multi_label=True))
    for label in ("0|1|0", "a|a|b"):
        written = [{"text": f"text {n}", "label": label} for n in range(16)]
        assert "has a class twice" in refused(config(tmp_path, TASK, written, multi_label=True))
    single = recipe_class(TASK)(config(tmp_path, TASK, rows))
    with pytest.raises(RequestError, match=r"data\.multi_label=true"):
        single.prepare()


def test_spaces_around_a_class_are_not_its_name(tmp_path: Path) -> None:
    rows = [{**row, "label": row["label"] + " " * (n % 3)} for n, row in enumerate(TEXTS)]
    assert prepared(config(tmp_path, TASK, rows)).labels == ["neg", "pos"]


def test_rows_that_are_left_out_say_what_they_lack(tmp_path: Path) -> None:
    rows = [*TEXTS, {"text": "a", "label": ""}, {"text": " ", "label": 0}, {"text": "", "label": ""}]
    said = refused(config(tmp_path, TASK, rows))
    assert [f":{line}" in said for line in (25, 26, 27)] == [True] * 3 and "data.empty=skip" in said
    assert "2 of 26 rows are dropped" in refused(config(tmp_path, TASK, rows, empty="skip"))
    recipe = prepared(config(tmp_path, TASK, rows, empty="skip", max_dropped=0.1))
    found = {change["what"]: (change["count"], change["first"][-3:]) for change in recipe.report["changes"]}
    assert found == {"rows without 'label'": (1, ":25"), "rows without 'text'": (1, ":26"), "empty rows": (1, ":27")}
    pairs = [{**row, "other": "b" if n else ""} for n, row in enumerate(TEXTS)]
    assert "column 'other' is blank" in refused(config(tmp_path, TASK, pairs, pair="other"))
    tokens = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 8 + [{"tokens": [" ", "\t"], "tags": ["X", "Y"]}]
    assert ":9" in refused(config(tmp_path, "token_classification", tokens))
    nothing = [*TEXTS, {"text": None, "label": "pos"}, {"text": "a", "label": None}]
    assert ":25" in refused(config(tmp_path, TASK, nothing))
    changes = prepared(config(tmp_path, TASK, nothing, empty="skip", max_dropped=0.1)).report["changes"]
    assert [change["what"] for change in changes] == ["rows without 'text'", "rows without 'label'"]
    inner = [{"translation": {"en": "a", "fr": "b"}}] * 7 + [{"translation": {"en": "a", "fra": "b"}}]
    cfg = config(tmp_path, "translation", inner, source="translation.en", target="translation.fr")
    with pytest.raises(RequestError, match=r"(?s)'translation' of this row has: en, fra.*translation\.fra"):
        prepared(cfg)


def test_rows_that_are_cut_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "word " * (30 if n < 3 else 1), "label": "ab"[n % 2]} for n in range(16)]
    said = prepared(config(tmp_path, TASK, rows, seq_length=8)).said()
    assert "cut: 3 rows truncated to data.seq_length (18.8% of 16 rows; data.seq_length=" in said
    enough = re.search(r"data\.seq_length=(\d+) keeps 95% whole; first: .*:1\)", said)
    assert enough, said
    assert "cut:" not in prepared(config(tmp_path, TASK, rows, seq_length=int(enough[1]))).said()
    pairs = [{"source": "word " * (30 if n < 3 else 1), "target": "word " * (30 if n == 5 else 1)} for n in range(16)]
    said = prepared(config(tmp_path, "translation", pairs, seq_length=8)).said()
    assert "cut: 3 sources truncated" in said and "cut: 1 targets truncated" in said


def test_a_models_head_keeps_its_order(tmp_path: Path) -> None:
    cfg = config(tmp_path, TASK, TEXTS)
    cfg.model = ModelConfig(path=str(saved(prepared(cfg), tmp_path / "model")))
    cfg.data.labels = ["pos", "neg"]
    assert "in another order" in refused(cfg) and "data.labels=[neg,pos]" in refused(cfg)
    cfg.data.labels, cfg.data.multi_label = ["neg", "pos"], True
    recipe = recipe_class(TASK)(cfg)
    recipe.finished = True
    with pytest.raises(RequestError, match="problem_type=single_label_classification"):
        recipe.prepare()
    with pytest.raises(RequestError, match="which is which"):  # the model's "1" is its output 0
        order_of_classes(None, ["1", "2", "3"], ["0", "1", "2"])


def test_a_model_knows_whether_questions_may_have_no_answer(tmp_path: Path) -> None:
    """Not the training rows that happen to be beside those that are judged."""
    asked = {"question": "q", "context": "the cat sat", "answers": {"text": ["cat"], "answer_start": [4]}}
    none = {**asked, "answers": {"text": [], "answer_start": []}}
    cfg = config(tmp_path, "question_answering", [asked, none] * 8)
    folder = saved(prepared(cfg), tmp_path / "model")
    cfg = config(tmp_path, "question_answering", [asked] * 16)
    cfg.model = ModelConfig(path=str(folder))
    recipe = recipe_class(cfg.task)(cfg)
    recipe.finished = True
    recipe.prepare()
    part = {"id": 0, "question": "q", "prediction": "cat", "label": [], "_score": 1.0, "_none": 2.0, "_first": True}
    assert recipe.merged([part])[0]["prediction"] == ""


@pytest.mark.parametrize(("tags", "metric", "nearest"), [("AB", "f1", "macro_f1"), (["O", "B-X"], "macro_f1", "f1")])
def test_a_metric_that_tags_do_not_have(tmp_path: Path, tags: Any, metric: str, nearest: str) -> None:
    """Known before anything is built, or an earlier run gives way to this one."""
    rows = [{"tokens": ["alpha", "beta"], "tags": list(tags)}] * 8
    cfg = config(tmp_path, "token_classification", rows)
    cfg.eval.metric = metric
    assert f"eval.metric={nearest}" in refused(cfg)
    cfg.eval.metric = nearest
    prepared(cfg)


def test_windows_that_cannot_be(tmp_path: Path) -> None:
    rows = [{"question": "why so", "context": "a b c", "answers": {"text": ["b"], "answer_start": [2]}}] * 8
    assert "question alone" in refused(config(tmp_path, "question_answering", rows, seq_length=11))
    wide = config(tmp_path, "question_answering", rows, seq_length=32, stride=500)
    assert [problem.key for problem in recipe_class(wide.task)(wide).check()] == ["data.stride"]


def test_rows_without_a_token_to_learn(tmp_path: Path) -> None:
    rows = [{"tokens": ["alpha", "beta"], "tags": ["A", "B"]}] * 8
    recipe = prepared(config(tmp_path, "token_classification", rows))
    recipe.tokenizer.backend_tokenizer.encode_special_tokens = False
    recipe.tokenizer = lambda tokens, **options: _Nothing(len(tokens))
    meter = Meter()
    both = [Row("x:1", held_out, {"tokens": ["alpha"], "tags": ["A"]}) for held_out in (False, True)]
    assert [len(found) for found in recipe.encode(both, Problems(), meter)] == [0, 1]
    assert meter.counts == {"rows whose first token is cut off": 1}


class _Nothing(dict[str, Any]):
    """What a tokenizer makes of texts of which only special tokens are left."""

    def __init__(self, size: int):
        super().__init__(input_ids=[[0, 0]] * size)

    def word_ids(self, number: int) -> list[None]:
        return [None, None]


def test_targets_stay_within_a_decoders_positions(tmp_path: Path) -> None:
    rows = [{"source": "a b c", "target": "word " * 80} for _ in range(8)]
    cfg = config(tmp_path, "translation", rows, seq_length=60)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    cfg.model = ModelConfig(type="bart", config={**size, "max_position_embeddings": 60})
    cfg.eval.new_tokens = 8
    recipe = prepared(cfg)
    assert recipe.collate([recipe.train.row(0)], 1)["labels"].shape == (1, 60)
    assert "3 held-out targets are longer than eval.new_tokens=8" in recipe.said()


def numbers(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Config:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)
    return Config(task="regression", model=ModelConfig(type="linear_regression"), data=data, batch=BatchConfig(4, 4, 1))


def test_columns_of_numbers_that_cannot_be_meant(tmp_path: Path) -> None:
    rows = [{"x": n, "y": n * n, "label": 1e5 * n} for n in range(16)]
    for features, says in ((["x", "label"], "'label' is the label"), (["x", "x"], "stands there twice")):
        cfg = numbers(tmp_path, rows, features=features)
        assert [says in str(problem) for problem in recipe_class(cfg.task)(cfg).check()] == [True]
    recipe = prepared(numbers(tmp_path, rows, features=["x", "y"]))
    assert "label is" in recipe.said() and "scale them" in recipe.said() and "x is" not in recipe.said()
    folder = saved(recipe, tmp_path / "model")
    cfg = numbers(tmp_path, rows, features=["y", "x"])
    cfg.model = ModelConfig(path=str(folder))
    assert "data.features=[x,y]" in refused(cfg)
    assert "squared in float32" in refused(numbers(tmp_path, [{"x": 1, "label": 1e24}] * 8, features=["x"]))
    assert read_number("90,000", "f:1", "price").nearest == "90000"  # type: ignore[union-attr]


def test_rows_that_a_run_was_trained_on(tmp_path: Path) -> None:
    """By where they are, however it is written, and by what they are, wherever."""
    run, file = tmp_path / "run", tmp_path / "rows.csv"
    (run / "model").mkdir(parents=True)
    trained = DataConfig(kind="csv", path=str(file), held_out=0.2)
    (run / "config.yaml").write_text(json.dumps({"data": {**vars(trained)}}))
    (run / "summary.json").write_text(json.dumps({"rows": {"sources": ["abc", "xyz"], "files": ["1", "2"]}}))

    def key(rows: str, files: str = "", held_out_files: str = "", **changes: Any) -> str | None:
        found = {"sources": [rows], "files": list(files), "held_out": list(held_out_files)}
        problem = _seen(run / "model", DataConfig(**{**vars(trained), **changes}), found)
        return problem and problem.rule

    assert key("abc") is None and key("abc", held_out=0.1) is None and key("abc", eval_path="other.csv") is None
    assert "held out 0.2" in str(key("abc", held_out=0.4))
    assert "held out 0.2" in str(key("abc", held_out=0.4, path="elsewhere.csv"))
    assert "held out 0.2" in str(key("abc", held_out=0.4, path=f"{tmp_path}/run/../rows.csv"))
    assert "has changed" in str(key("other"))
    assert key("other", path="elsewhere.csv", held_out=0.9) is None
    assert "in other ones" in str(key("other", "23", path="elsewhere.csv"))
    assert "held out 0.2" in str(key("other", "23", path="elsewhere.csv", held_out=0.9))
    assert key("other", "345", path="elsewhere", kind="text") is None  # a licence, perhaps
    assert "trained on what is in this file" in str(key("abc", held_out_files="2", eval_path="copy.csv"))
    assert key("abc", "12", "3", eval_path="copy.csv") is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.yaml", "[1,", "no YAML"), ("config.yaml", "5", "must be a mapping"),
        ("config.yaml", "data: null", "data is null"), ("config.yaml", "data: {held_out: many}", "data.held_out is"),
        ("config.yaml", "data: {held_out: .nan}", "data.held_out is"), ("config.yaml", "", "must be a mapping"),
        ("config.yaml", "data: {path: [1]}", "data.path is [1]"), ("config.yaml", b"\xff", "no YAML"),
        ("summary.json", '{"rows":', "no JSON"), ("summary.json", "[]", "must be a mapping"),
        ("summary.json", "", "no JSON"), ("summary.json", '{"rows": {"files": 3}}', "rows is"),
    ],
)  # fmt: skip
def test_a_damaged_run_does_not_tell_what_it_was_trained_on(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text("data: {kind: csv, held_out: 0.2}")
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError) as caught:
        _seen(run, DataConfig(kind="csv", path="rows.csv"), None)
    assert f"error: {run / name}: damaged" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("task", [TASK, "causal_lm"])
def test_the_same_rows_under_another_name_are_known(tmp_path: Path, task: str) -> None:
    """By a run of any task, packed or not, and by the check of the splits of one run."""
    rows = TEXTS * 4
    first = recipe_class(task)(config(tmp_path, task, rows))
    first.prepare()
    content = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "copy.jsonl").write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("copy.jsonl", "packed.jsonl.gz"):
        again = config(tmp_path, task, rows)
        again.data.path = str(tmp_path / name)
        recipe = recipe_class(task)(again)
        recipe.prepare()
        assert recipe.report["rows"] == first.report["rows"] and first.report["rows"]["files"]
        with pytest.raises(RequestError, match=rf"{name} holds what .*rows\.jsonl holds"):
            recipe_class(task)(config(tmp_path, task, rows, eval_path=str(tmp_path / name))).prepare()
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps({"data": vars(config(tmp_path, task, rows).data)}))
    problem = _seen(run, replace(recipe.cfg.data, held_out=0.9), recipe.report["rows"])
    assert problem and "was trained on the rest of these rows" in problem.rule  # the summary does not say it: the file


def test_the_step_whose_model_was_kept(tmp_path: Path) -> None:
    cfg = config(tmp_path, TASK, TEXTS)
    recipe, file = recipe_class(TASK)(cfg), tmp_path / "metrics.jsonl"
    assert _kept(file, cfg, recipe) is None
    rows = [{"step": step, "split": "held_out", "loss": loss, "accuracy": 1 - loss} for step, loss in
            ((0, 0.9), (2, 0.5), (4, 0.5), (6, 0.7))]  # fmt: skip
    lines = [json.dumps(row) for row in [*rows, {"step": 7, "loss": 0.1}]]
    file.write_text("\n".join(lines) + '\n{"step": 8, "spl')
    for metric, step in (("loss", 2), ("accuracy", 2), (None, None), ("mcc", None)):
        cfg.eval.metric = metric
        assert _kept(file, cfg, recipe) == step


def test_half_precision_that_cannot_hold_the_weights(tmp_path: Path) -> None:
    folder = saved(prepared(config(tmp_path, TASK, TEXTS)), tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], 1e5)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"classifier\.bias has values up to 1e\+05"):
        convert(folder, tmp_path / "half", torch.float16)
    assert not list(tmp_path.glob("*half*"))
    convert(folder, tmp_path / "brain", torch.bfloat16)
    assert np.isfinite(load_file(tmp_path / "brain/model.safetensors")["classifier.bias"].float()).all()


def finished(cfg: Config, folder: Path) -> Any:
    """The recipe as launch/evaluate.py has it, for a saved model."""
    cfg.model, cfg.data.vocab_size = ModelConfig(path=str(folder)), None
    recipe = recipe_class(cfg.task)(cfg)
    recipe.finished = True
    recipe.prepare()
    return recipe


def test_a_strangers_model_is_judged_on_what_its_own_tokenizer_gives(tmp_path: Path) -> None:
    """One without ends gets none; ours has them in its tokenizer."""
    folder = saved(prepared(config(tmp_path, TASK, TEXTS)), tmp_path / "ours")
    text = TEXTS[0]["text"]
    for end in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not end:
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
            tokenizer.save_pretrained(folder)
        ids = finished(config(tmp_path, TASK, TEXTS), folder).held_out.row(0)["input_ids"].tolist()
        assert ids == tokenizer(text)["input_ids"] and (ids[0] == tokenizer.eos_token_id) == end


def test_a_tokenizer_that_forgets_its_ends_when_loaded(tmp_path: Path) -> None:
    """transformers 5.23: GPT-NeoX' class makes its post-processor anew."""
    tokenizer = train_tokenizer([row["text"] for row in TEXTS], 300)
    neox = GPTNeoXTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    add_ends(neox)
    text = TEXTS[0]["text"]
    neox.save_pretrained(tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")(text)["input_ids"] != neox(text)["input_ids"]
    save_tokenizer(neox, tmp_path / "saved")
    for texts in ((text,), (text, "and more")):
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")(*texts)["input_ids"] == neox(*texts)["input_ids"]


def test_rows_that_are_trained_on_and_held_out(tmp_path: Path) -> None:
    cfg = config(tmp_path, TASK, TEXTS)
    cfg.data.eval_path = cfg.data.path
    assert "is among the training files" in refused(cfg)
    finished(cfg, saved(prepared(config(tmp_path, TASK, TEXTS)), tmp_path / "model"))  # who only judges may say so
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/dev.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    cfg = config(tmp_path, TASK, TEXTS, eval_path=str(tmp_path / "folder/dev.jsonl"))
    cfg.data.path = str(tmp_path / "folder")
    assert "dev.jsonl is among" in refused(cfg)
    (tmp_path / "linked.jsonl").hardlink_to(tmp_path / "rows.jsonl")
    linked = config(tmp_path, TASK, TEXTS, eval_path=str(tmp_path / "linked.jsonl"))
    assert "is among the training files" in refused(linked)
    cfg = config(tmp_path, "causal_lm", TEXTS)
    cfg.data.eval_path = cfg.data.path
    with pytest.raises(RequestError, match="is among the training files"):
        recipe_class("causal_lm")(cfg).prepare()
    first, second = tmp_path / "rows.jsonl", tmp_path / "again.jsonl"
    second.write_text(first.read_text() + "\n")
    parts = [SourceConfig(kind="jsonl", path=str(first), eval_path=str(second)),
             SourceConfig(kind="jsonl", path=str(second), eval_path=str(tmp_path / "folder/dev.jsonl"))]  # fmt: skip
    cfg.data = DataConfig(kind="mixture", mixture=parts, cache_dir=str(tmp_path / "cache"), seq_length=8)
    with pytest.raises(RequestError, match=r"again\.jsonl is among the training files of data\.mixture\[1\]"):
        recipe_class("causal_lm")(cfg).prepare()
    hub = DataConfig(kind="hub", name="x", split="train", eval_split="train")
    assert "is the training split" in str(HubSource(hub, "data", 0.1, None).in_both_splits())


def test_spaces_around_an_answer_are_none_of_its_tokens(tmp_path: Path) -> None:
    context = "we won in 1999 and then lost"
    rows = [{"question": "when", "context": context, "answers": {"text": [text], "answer_start": [context.index(text)]}}
            for text in ("1999", " 1999", "1999 ")] * 4  # fmt: skip
    recipe = prepared(config(tmp_path, "question_answering", rows))
    labels = {tuple(recipe.train.row(n)["labels"]) for n in range(len(recipe.train))}
    assert len(labels) == 1 and (0, 0) not in labels
    digits = " ".join("0123456789")
    long = {"question": "0", "context": digits, "answers": {"text": [digits], "answer_start": [0]}}
    cut = config(tmp_path, "question_answering", [long] * 12, seq_length=16, stride=2, vocab_size=257)
    said = refused(cut)
    assert "whole in no window" in said and "try: data.seq_length=" in said
    cut.data.seq_length = int(said.rpartition("data.seq_length=")[2].partition(",")[0])
    prepared(cut)
    few = [{**long, "context": "0 1 2", "answers": {"text": ["1"], "answer_start": [2]}}] * 20
    said = prepared(
        config(tmp_path, "question_answering", [*few, long], seq_length=16, stride=2, vocab_size=257)
    ).said()
    assert "dropped: 1 questions whose answer is whole in no window" in said and "rows.jsonl:21" in said


def test_questions_that_share_an_id_are_judged_apart(tmp_path: Path) -> None:
    """And answers may stand as in SQuAD's files: a list of objects."""
    context = "we won in 1999 and then lost in 2000"
    answers = [[{"text": text, "answer_start": context.index(text)}] for text in ("1999", "2000")]
    rows = [{"id": "same", "question": "when", "context": context, "answers": answers[n % 2]} for n in range(16)]
    recipe = prepared(config(tmp_path, "question_answering", rows))
    size = len(recipe.held_out)
    batch = recipe.collate([recipe.held_out.row(n) for n in range(size)], size)
    outputs = {"span": batch["labels"], "score": np.zeros(size), "none": np.zeros(size) - 1}
    found = recipe.merged(recipe.predictions(batch, outputs))
    assert [row["id"] for row in found] == ["same"] * size
    assert all(row["label"] == [row["prediction"]] for row in found)


def test_classes_of_images(tmp_path: Path) -> None:
    check = recipe_class("image_classification")(config(tmp_path, "image_classification", TEXTS)).check_values
    columns = {"image": "image", "label": "label"}
    for label in (None, [0, 2], True):
        content = {"image": {"bytes": b""}, "label": label}
        assert "must be a name or a whole number" in str(check(content, "x:1", columns)[0])


def test_classes_that_every_row_has(tmp_path: Path) -> None:
    """Two classes as zeros and ones would be read as the names of both, in each row."""
    rows = [{"text": f"text {n}", "label": [n % 2, 1 - n % 2]} for n in range(16)]
    assert "every training row has each of the classes" in refused(config(tmp_path, TASK, rows, multi_label=True))
    blank = [*TEXTS, {"text": "a", "label": "   "}]
    assert prepared(config(tmp_path, TASK, blank, empty="skip")).labels == ["neg", "pos"]


def test_features_of_other_columns(tmp_path: Path) -> None:
    rows = [{"a": n, "b": -n, "c": n * n, "label": n} for n in range(16)]
    folder = saved(prepared(numbers(tmp_path, rows, features=["a", "b"])), tmp_path / "model")
    for features, right in ((["b", "c"], False), (["a", "c"], True), (["a", "b"], True)):
        cfg = numbers(tmp_path, rows, features=features)
        cfg.model = ModelConfig(path=str(folder))
        assert right or "in another order" in refused(cfg)
        assert not right or prepared(cfg)


def test_texts_with_a_mark_of_their_language_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, "translation", [{"source": "a b", "target": "c d"}] * 8)
    cfg.model = ModelConfig(type="bart", config={"d_model": 16, "encoder_layers": 1, "decoder_layers": 1})
    recipe = prepared(cfg)
    recipe.tokenizer.src_lang = "en_XX"
    assert "src_lang" in str(recipe.check_model()[0])


def test_a_decoder_that_sees_what_is_padded() -> None:
    cpu, small = torch.device("cpu"), {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    rwkv = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **small, attention_hidden_size=32))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small, **heads))
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    assert [bool(check_padding(model.eval(), cpu)) for model in (rwkv, llama, gpt2)] == [True, False, False]


def test_a_correlation_over_many_rows() -> None:
    """Matthews' coefficient from counts, in whole numbers: float32 is 1% off."""
    labels = [1] * 10 + [0] * 999_990
    predicted = [1] * 4 + [0] * 6 + [1] * 6 + [0] * 999_984
    tp, fp, fn, tn = 4, 6, 6, 999_984
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert classification_scores(predicted, labels, 2)["mcc"] == pytest.approx(expected, rel=1e-9)


def test_words_of_a_text_keep_their_space() -> None:
    """Tokenizers that write it into the word (GPT-2's, Gemma's) and others."""
    byte_level = train_tokenizer(["we saw the sea"] * 9, 300)
    gemma = Tokenizer(models.BPE())
    gemma.normalizer = normalizers.Replace(" ", "▁")
    gemma.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    gemma.train_from_iterator(["we saw the sea"] * 9, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    words = Tokenizer(models.WordLevel({"we": 0, "saw": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = [PreTrainedTokenizerFast(tokenizer_object=one) for one in (gemma, words)]
    assert [spaces_are_of_words(tokenizer) for tokenizer in (byte_level, *found)] == [True, True, False]


def test_a_marian_model_has_a_tokenizer_for_each_side(tmp_path: Path) -> None:
    """Its two SentencePiece models are among what is fetched from the hub; weights in a pickle are refused."""
    import sentencepiece

    sides = {"source": ["the red cat", "a blue house"], "target": ["le chat rouge", "une maison bleue"]}
    folder = tmp_path / "marian"
    folder.mkdir()
    pieces: set[str] = set()
    for side, texts in sides.items():
        (tmp_path / side).write_text("\n".join(texts * 9))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / side), model_prefix=str(folder / side), vocab_size=28, model_type="char",
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        (folder / f"{side}.vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces |= {model.id_to_piece(number) for number in range(model.get_piece_size())}
    names = ["</s>", "<unk>", *sorted(pieces - {"<s>", "</s>", "<unk>"}), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    pad = len(names) - 1
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    marian = AutoConfig.for_model("marian", **size, vocab_size=len(names), decoder_vocab_size=len(names),
                                  pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=0)  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(marian).save_pretrained(folder)
    tokenizer = MarianTokenizer(**{f"{side}_spm": str(folder / f"{side}.spm") for side in ("source", "target")},
                                vocab=str(folder / "vocab.json"))  # fmt: skip
    tokenizer.save_pretrained(folder)
    assert all(any(fnmatch(file.name, one) for one in (*WANTED, single_file())) for file in folder.iterdir())
    rows = [{"source": a, "target": b} for a, b in zip(*sides.values(), strict=True)] * 8
    cfg = config(tmp_path, "translation", rows, vocab_size=None)
    cfg.model, cfg.eval.new_tokens = ModelConfig(path=str(folder)), 8
    recipe = prepared(cfg)
    row = recipe.train.row(0)
    target = recipe.tokenizer(text_target=row["reference"].tobytes().decode())["input_ids"]
    assert row["labels"].tolist() == target and target[-1] == 0 and 1 not in target
    recipe.save_processor(tmp_path / "saved")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"pickled weights only, .* never loaded \(pytorch_model\.bin\)"):
        local_folder(cfg.model)
