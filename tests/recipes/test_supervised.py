"""What recipes of labelled examples share: order by length, labels, windows, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import RequestError
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig
from launch.runtime.loop import Judge, Progress
from recipes import recipe_class
from recipes.data.classes import order_of_classes
from recipes.data.examples import Shuffled, by_length
from recipes.data.packing import round_up
from recipes.models.loss import IGNORE


class Lengths:
    """Examples of which only the lengths matter."""

    def __init__(self, lengths: np.ndarray):
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def row(self, index: int) -> dict[str, Any]:
        return {"id": index}


@pytest.mark.parametrize("rows", [1, 7, 64, 1001])
@pytest.mark.parametrize("batch", [1, 8])
def test_an_epoch_has_each_row_once_and_batches_of_similar_length(rows: int, batch: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, rows)
    bucketed = Shuffled(Lengths(lengths), 0, batch, [lengths], window=64)  # type: ignore[arg-type]
    plain = Shuffled(Lengths(lengths), 0, batch, None)  # type: ignore[arg-type]
    for order in (bucketed, plain):
        for epoch in (0, 1):
            found = [order.locate(index) for index in range(epoch * rows, (epoch + 1) * rows)]
            assert sorted(found) == list(range(rows))
    assert rows < 64 or [bucketed.locate(i) for i in range(rows)] != [bucketed.locate(rows + i) for i in range(rows)]

    def padding(order: Shuffled, epoch: int) -> int:
        """Of the batches of an epoch, which begin where those of the epoch before end."""
        places = range(-(-epoch * rows // batch) * batch, (epoch + 1) * rows - batch, batch)
        parts = [[lengths[order.locate(i)] for i in range(at, at + batch)] for at in places]
        return sum(max(part) * len(part) - sum(part) for part in parts)

    if rows == 1001 and batch == 8:
        for epoch in (0, 1, 2):
            assert padding(bucketed, epoch) < 0.2 * padding(plain, epoch)


def test_a_window_of_one_batch_sorts_the_rows_of_the_draw() -> None:
    """A batch has the rows that it would have anyway; its micro-batches have similar ones."""
    lengths = np.random.default_rng(0).integers(1, 200, 1001)
    one, plain = (Shuffled(Lengths(lengths), 0, 16, given) for given in ([lengths], None))  # type: ignore[arg-type]
    for at in range(0, 3 * 1001, 16):
        batch, drawn = ([order.locate(i) for i in range(at, at + 16)] for order in (one, plain))
        assert sorted(batch) == sorted(drawn)
        assert at // 1001 < (at + 15) // 1001 or list(lengths[batch]) == sorted(lengths[drawn])


def test_two_sides_of_a_row_are_both_of_similar_length() -> None:
    draw = np.random.default_rng(0)
    source = draw.integers(1, 60, 4096)
    target = np.clip(source + draw.integers(-12, 13, 4096), 1, None)

    def padding(order: np.ndarray) -> float:
        sides = [side[order].reshape(-1, 32) for side in (source, target)]
        return float(1 - (source.sum() + target.sum()) / (32 * sum(round_up(side.max(1)).sum() for side in sides)))

    together = padding(np.argsort(source + target, kind="stable"))
    assert padding(by_length([source, target])) < 0.8 * together < 0.5 * padding(np.arange(4096))
    assert by_length([source]).tolist() == np.argsort(source, kind="stable").tolist()


def config(tmp_path: Path, task: str, rows: list[dict[str, Any]], **data: Any) -> Config:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bert = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"seq_length": 32, "vocab_size": 300, "held_out": 0.25, "kind": "jsonl", **data}
    return Config(
        task=task,
        model=ModelConfig(type="bert", config={**bert, "max_position_embeddings": 64}),
        data=DataConfig(path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **settings),
        batch=BatchConfig(4, 4, 1),
    )


def prepared(cfg: Config) -> Any:
    recipe = recipe_class(cfg.task)(cfg)
    assert recipe.check() == []
    recipe.prepare()
    return recipe


def test_classes_by_name_and_by_number(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 3} for n in range(24)]
    assert prepared(config(tmp_path, "sequence_classification", rows)).labels == ["0", "1", "2"]
    named = prepared(config(tmp_path, "sequence_classification", rows, labels=["low", "mid", "high"]))
    first = named.held_out.row(0)
    assert named.labels[first["labels"][0]] == ["low", "mid", "high"][0]
    numbers = [{"text": "x", "label": str(n)} for n in (10, 9, 2, 10, 9, 2, 10, 9)]
    assert prepared(config(tmp_path, "sequence_classification", numbers)).labels == ["2", "9", "10"]


def test_the_same_rows_elsewhere_are_the_same_rows(tmp_path: Path) -> None:
    """Content decides, not the path; other classes for the same numbers do."""
    rows = [{"text": f"{n}", "label": ("a", "b")[n % 2]} for n in range(8)]
    found = set()
    for number, of in enumerate((rows, rows, [{**row, "label": f"{row['label']}{row['label']}"} for row in rows])):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.add(prepared(config(folder, "sequence_classification", of)).report["fingerprint"])
        assert len(found) == max(1, number)


def test_several_classes_of_a_row(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": [c for c in "abc" if (n >> "abc".index(c)) & 1]} for n in range(16)]
    recipe = prepared(config(tmp_path, "sequence_classification", rows, multi_label=True))
    batch = recipe.collate([recipe.train.row(i) for i in range(3)], 4)
    assert batch["labels"].shape == (4, 3) and (batch["labels"][3] == -100).all()
    assert recipe.count(batch)[0] == 3
    logits = np.where(batch["labels"] > 0, 1.0, -1.0)
    found = recipe.predictions(batch, {"logits": logits})
    assert len(found) == 3 and recipe.scores(found)["accuracy"] == 1.0


def test_rows_without_any_of_many_classes_stay(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": ["", "a", "a|b", "b"][n % 4]} for n in range(16)]
    recipe = prepared(config(tmp_path, "sequence_classification", rows, multi_label=True))
    assert len(recipe.train) + len(recipe.held_out) == 16 and recipe.labels == ["a", "b"]


def test_a_label_is_a_number_of_a_class_only_where_classes_are_no_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 5} for n in range(40)]
    stars = config(tmp_path, "sequence_classification", rows, labels=["1", "2", "3", "4", "5"])
    with pytest.raises(RequestError, match=r"not in the label set|without an example"):
        prepared(stars)
    rows = [{"text": f"text {n}", "label": "²" if n == 20 else n % 2} for n in range(40)]
    with pytest.raises(RequestError, match="not in the label set"):
        prepared(config(tmp_path, "sequence_classification", rows, labels=["low", "high"]))


def test_a_metric_that_the_rows_do_not_have(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": ["a"]} for n in range(16)]
    many = config(tmp_path, "sequence_classification", rows, multi_label=True)
    many.eval.metric = "mcc"
    assert "eval.metric" in str(recipe_class(many.task)(many).check_evaluation())
    judge = Judge(many, recipe_class(many.task)(many), Progress())
    with pytest.raises(RequestError, match="with these data there are loss, accuracy"):
        judge.check({"loss": 1.0, "accuracy": 0.5})


def test_the_order_of_a_models_classes() -> None:
    mnli = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]
    assert order_of_classes(None, mnli, ["entailment", "neutral"]) == ["CONTRADICTION", "neutral", "entailment"]
    assert order_of_classes(None, ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "2"]) == ["0", "1", "2"]
    assert order_of_classes(None, ["positive", "negative"], ["negative", "positive"]) == ["positive", "negative"]
    assert order_of_classes(["neg", "pos"], ["LABEL_0", "LABEL_1"], ["pos"]) == ["neg", "pos"]
    assert order_of_classes(["neg", "pos"], ["NEGATIVE", "POSITIVE"], ["pos"]) == ["neg", "pos"]
    for given, names, classes in (
        (None, ["LABEL_0", "LABEL_1"], ["neg", "pos"]), (None, ["a", "b", "c"], ["a", "b", "d"]), (None, None, ["a"]),
        (["neutral", "contradiction", "entailment"], mnli, ["neutral"]), (None, mnli, ["3"]),
        (None, mnli, ["0", "2"]),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=r"data\.labels"):
            order_of_classes(given, names, classes)


def test_words_of_a_byte_level_tokenizer_are_those_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import token_classification as module

    asked: list[Any] = []
    real = module.spaces_are_of_words
    monkeypatch.setattr(module, "spaces_are_of_words", lambda tokenizer: asked.append(tokenizer) or real(tokenizer))
    words = ["we", "saw", "Washington", "twice"]
    rows = [{"tokens": words, "tags": ["O", "O", "B-LOC", "O"]} for _ in range(16)]
    recipe = prepared(config(tmp_path, "token_classification", rows))
    ids = recipe.train.row(0)["input_ids"].tolist()
    assert ids == recipe.tokenizer(" ".join(words))["input_ids"]
    assert len(asked) <= 2, "the whole tokenizer is read for each row"


def test_answers_that_are_none_or_not_where_they_are_said_to_be(tmp_path: Path) -> None:
    for text, start in (("cat", -7), ("", 0), ("cat", 1), ("cat", True)):
        rows = [{"question": "q", "context": "the cat sat", "answers": {"text": [text], "answer_start": [start]}}] * 8
        with pytest.raises(RequestError):
            prepared(config(tmp_path, "question_answering", rows))


def test_an_encoder_decoder_is_for_translation(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(24)]
    cfg = config(tmp_path, "sequence_classification", rows)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    cfg.model = ModelConfig(type="bart", config={**size, "max_position_embeddings": 64})
    with pytest.raises(RequestError, match="encoder-decoder"):
        prepared(cfg)


def test_pairs_have_an_end_between_them(tmp_path: Path) -> None:
    rows = [{"text": f"one {n}", "other": f"two {n}", "label": n % 2} for n in range(16)]
    recipe = prepared(config(tmp_path, "sequence_classification", rows, pair="other"))
    ids = recipe.held_out.row(0)["input_ids"]
    assert (ids == recipe.tokenizer.eos_token_id).sum() == 3


def test_tokens_without_pieces_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["alpha", "beta", "gamma"][: 1 + n % 3], "tags": ["A", "B", "A"][: 1 + n % 3]} for n in range(16)
    ]
    rows += [{"tokens": ["alpha", f"q{n}zx{n * n}wk"], "tags": ["A", "B"]} for n in range(4)]  # of several pieces
    recipe = prepared(config(tmp_path, "token_classification", rows, seq_length=8))
    every = [split.row(n) for split in (recipe.train, recipe.held_out) for n in range(len(split))]
    assert any((row["tokens"] < 0).any() for row in every)
    for row in every:
        assert (row["labels"][row["tokens"] < 0] == IGNORE).all() and (row["labels"][row["tokens"] >= 0] >= 0).all()
    row = recipe.held_out.row(0)
    assert len(row["tags"]) == (row["tokens"] >= 0).sum() == (row["labels"] >= 0).sum()
    batch = recipe.collate([row], 2)
    (found,) = recipe.predictions(batch, {"classes": np.maximum(batch["labels"], 0)})
    assert found["prediction"] == found["label"]


def test_windows_find_an_answer_behind_the_first_one(tmp_path: Path) -> None:
    context = " ".join(f"word{n}" for n in range(60)) + " needle " + " ".join(f"more{n}" for n in range(20))
    answer = {"text": ["needle"], "answer_start": [context.index("needle")]}
    rows = [{"question": "which?", "context": context, "answers": answer} for _ in range(8)]
    recipe = prepared(config(tmp_path, "question_answering", rows, seq_length=64, stride=8))
    windows = [recipe.held_out.row(index) for index in range(len(recipe.held_out))]
    inside = [row for row in windows if row["labels"][0] > 0]
    assert inside and len(windows) > 3
    spans = inside[0]["spans"].reshape(-1, 2)
    start, stop = spans[inside[0]["labels"][0], 0], spans[inside[0]["labels"][1], 1]
    assert context[start:stop].strip() == "needle"
    parts = [
        {
            "id": n,
            "question": "q",
            "prediction": text,
            "label": ["needle"],
            "_score": score,
            "_none": 0.0,
            "_first": n == 0,
        }
        for n, (text, score) in enumerate([("straw", 1.0), ("needle", 5.0)])
    ]
    assert [row["prediction"] for row in recipe.merged(parts)] == ["needle"]


def test_a_long_question_is_refused(tmp_path: Path) -> None:
    answer = {"text": ["b"], "answer_start": [2]}
    rows = [{"question": "why " * 40, "context": "a b c", "answers": answer} for _ in range(8)]
    with pytest.raises(RequestError, match="question alone"):
        prepared(config(tmp_path, "question_answering", rows))


def test_damaged_examples_are_made_again(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(16)]
    cfg = config(tmp_path, "sequence_classification", rows)
    before = prepared(cfg).held_out.row(0)["input_ids"].tolist()
    (file,) = (tmp_path / "cache").glob("examples-*/held_out.input_ids")
    file.write_bytes(b"")
    assert prepared(cfg).held_out.row(0)["input_ids"].tolist() == before


def refused(cfg: Config) -> str:
    with pytest.raises(RequestError) as error:
        prepared(cfg)
    return str(error.value)


TEXTS = [{"text": f"text {n}", "label": ["neg", "pos"][n % 2]} for n in range(24)]


def test_classes_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    task = "sequence_classification"
    assert "one class ('x')" in refused(config(tmp_path, task, [{**row, "label": "x"} for row in TEXTS]))
    empty = [{"text": row["text"], "label": []} for row in TEXTS]
    assert "no training row has a class" in refused(config(tmp_path, task, empty, multi_label=True))
    half = [*TEXTS, {"text": "a", "label": "p\ud83d"}]
    assert ":25" in refused(config(tmp_path, task, half))
    recipe = recipe_class(task)(config(tmp_path, task, TEXTS, labels=["neg", "pos", "pos"]))
    assert ["stands there twice" in str(problem) for problem in recipe.check()] == [True]
    for tags in ([True, "O"], ["", "O"], ["O", None]):
        rows = [{"tokens": ["a", "b"], "tags": tags}] * 8
        assert "must be a list of tags" in refused(config(tmp_path, "token_classification", rows))


def test_names_of_a_model_that_stand_elsewhere() -> None:
    with pytest.raises(RequestError, match=r"(?s)'pos' is output 1.*data\.labels=\[…,pos\]"):
        order_of_classes(["pos", "negative"], ["neg", "pos"], ["negative", "pos"])
    assert order_of_classes(["negative", "pos"], ["neg", "pos"], ["pos"]) == ["negative", "pos"]


def test_a_number_of_many_digits_names_its_line(tmp_path: Path) -> None:
    cfg = config(tmp_path, "sequence_classification", TEXTS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "a", "label": ' + "9" * 5000 + "}\n")
    assert "rows.jsonl:25" in refused(cfg) and "too many digits" in refused(cfg)


def test_a_decoder_has_positions_for_what_is_generated(tmp_path: Path) -> None:
    rows = [{"source": f"a {n}", "target": f"b {n}"} for n in range(16)]
    cfg = config(tmp_path, "translation", rows)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    cfg.model = ModelConfig(type="bart", config={**size, "max_position_embeddings": 32})
    cfg.eval.new_tokens = 33
    assert "eval.new_tokens=32" in refused(cfg)


def test_an_image_processor_and_a_model_of_other_sizes(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**size, intermediate_size=16, num_labels=10))
    model.save_pretrained(tmp_path / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    cfg = Config(
        task="image_classification",
        model=ModelConfig(path=str(tmp_path / "vit")),
        data=DataConfig(kind="digits", held_out=0.2, cache_dir=str(tmp_path / "cache")),
        batch=BatchConfig(4, 4, 1),
    )
    assert "gives 32×32 pixels" in refused(cfg)
    cfg.model = ModelConfig(type="vit", config={**size, "hidden_act": "nonsense"})
    refused(cfg)  # what transformers cannot build is no traceback either


def test_a_csv_file_of_one_column_names_its_delimiter(tmp_path: Path) -> None:
    cfg = config(tmp_path, "sequence_classification", TEXTS, kind="csv")
    (tmp_path / "rows.jsonl").write_text("text;label\n" + "a;b\nc;d\n" * 20)
    problems = recipe_class(cfg.task)(cfg).check()
    assert [problem.nearest for problem in problems] == ["data.delimiter=';'"]
