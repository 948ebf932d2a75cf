"""The names of classes: one class however it is written, and no header among them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import RequestError
from conf.schema import BatchConfig, Config, DataConfig, ModelConfig
from recipes import recipe_class
from recipes.data.classes import in_order, near_duplicates, normalised

SIZE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip


def prepared(folder: Path, text: str, task: str = "sequence_classification", **keys):
    """The recipe over a file of `text`."""
    kind = keys.pop("kind", "csv")
    (folder / f"rows.{kind}").write_text(text, encoding="utf-8")
    data = DataConfig(
        kind=kind, path=str(folder / f"rows.{kind}"), cache_dir=str(folder / "cache"), seq_length=32, held_out=0.2,
        vocab_size=300, **keys,
    )  # fmt: skip
    recipe = recipe_class(task)(
        Config(task=task, model=ModelConfig("bert", SIZE), data=data, batch=BatchConfig(4, 4, 1))
    )
    recipe.prepare()
    return recipe


def table(labels: list[str], count: int = 24) -> str:
    return "text,label\n" + "".join(f"text {n},{labels[n % len(labels)]}\n" for n in range(count))


def test_a_header_that_is_repeated_is_refused_with_its_line(tmp_path):
    with pytest.raises(RequestError, match=r"rows\.csv:26: the header is repeated"):
        prepared(tmp_path, table(["a", "b"]) + table(["a", "b"]))
    with pytest.raises(RequestError, match=r"rows\.csv:26: the header is repeated"):  # behind a mark of encoding
        prepared(tmp_path, table(["a", "b"]) + "\ufeff" + table(["a", "b"]))
    pairs = "source,target\n" + "a,b\n" * 12
    with pytest.raises(RequestError, match=r"rows\.csv:14: the header is repeated"):
        prepared(tmp_path, pairs * 2, "translation")


def test_a_class_named_like_its_column_is_refused_with_its_line(tmp_path):
    """A header that is not that of the first line, or of a file that is said to have none."""
    text = table(["a", "b"]) + "Text,Label\n" + table(["a", "b"])[11:]
    with pytest.raises(RequestError, match=r"rows\.csv:26: its class is the name of column 'label'"):
        prepared(tmp_path, text)
    lines = "".join(f'{{"tokens": ["a", "b"], "tags": ["X", "{"tags" if n == 7 else "Y"}"]}}\n' for n in range(24))
    with pytest.raises(RequestError, match=r"rows\.jsonl:8: its class is the name of column 'tags'"):
        prepared(tmp_path, lines, "token_classification", kind="jsonl")
    assert prepared(tmp_path, table(["a", "label"]), labels=["a", "label"]).labels == ["a", "label"]


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (["0", "1", "0.0", "1.00", " 1."], ["0", "1"]),
        (["caf\u00e9", "cafe\u0301", "tea"], ["café", "tea"]),
        (["a", "a\u00a0", "\u200bb", "b"], ["a", "b"]),
        (["007", "7", "7.0", "07"], ["7", "007", "07"]),
        (["-1", "-1.0", "+2", "2", "-0", "0"], ["-1", "0", "2"]),
        (["1e3", "1000", "²"], ["1e3", "1000", "²"]),
    ],
)
def test_one_class_however_it_is_written(tmp_path, written, labels):
    recipe = prepared(tmp_path, table(written, 60))
    assert sorted(recipe.labels) == sorted(labels)
    changed = [change for change in recipe.report["changes"] if change["effect"] == "changed"]
    assert bool(changed) == any(normalised(one) != one.strip() for one in written)
    assert all(change["first"].startswith(f"{tmp_path}/rows.csv:") and change["of"] == 60 for change in changed)
    assert sum(recipe._counts.values()) == len(recipe.train)


def test_labels_of_json_are_read_by_value_too(tmp_path):
    written = ["0", "1.0", "1", '"0"']
    rows = "".join(f'{{"text": "a {n}", "label": {written[n % 4]}}}\n' for n in range(24))
    assert prepared(tmp_path, rows, kind="jsonl").labels == ["0", "1"]
    with pytest.raises(RequestError, match="a name or a whole number"):
        prepared(tmp_path, rows.replace("1.0", "1.5"), kind="jsonl")
    named = prepared(tmp_path, rows, kind="jsonl", labels=["no", "yes"])
    assert set(named._counts) == {"no", "yes"}
    many = "".join(f'{{"text": "a {n}", "label": [{["0", "1.0", "0, 1"][n % 3]}]}}\n' for n in range(24))
    assert prepared(tmp_path, many, kind="jsonl", multi_label=True).labels == ["0", "1"]
    with pytest.raises(RequestError, match="has a class twice"):
        prepared(tmp_path, many.replace("0, 1", "1, 1.0"), kind="jsonl", multi_label=True)


def test_given_labels_and_those_of_a_model_are_read_alike(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert prepared(tmp_path, table([composed, "tea"]), labels=["tea", apart]).labels == ["tea", composed]
    assert in_order(["0.0", "1.0"], ["1", "0"]) == ["0", "1"]
    assert in_order([apart, "TEA"], ["tea", composed]) == [composed, "tea"]


def test_classes_that_may_be_one_are_said(tmp_path):
    recipe = prepared(tmp_path, table(["positive", "Positive", "negative"]))
    assert "may be one, written in two ways: 'positive' (5) and 'Positive' (8)" in recipe.said()
    counts = {
        "positive": 100,
        "postive": 2,
        "very-good": 5,
        "very good": 9,
        "01": 3,
        "1": 4,
        "10": 5,
        "B-x": 3,
        "I-x": 3,
    }
    assert set(near_duplicates(counts)) == {("very-good", "very good"), ("postive", "positive"), ("01", "1")}
    assert near_duplicates({"class_1": 4, "class_2": 4, "C": 3, "C++": 3, "-1": 3, "1": 3, "0.1": 2, "01": 1}) == [
        ("01", "1")
    ]


@pytest.mark.parametrize("word", ["nan", "None", "NULL", "N/A", "<NA>", '" nan"', ' "b"', " 'b'"])
def test_what_may_be_no_class_is_said_with_its_first_row(tmp_path, word):
    said = prepared(tmp_path, table(["a", "b", "c", word])).said()
    assert "doubtful: 6 labels " in said and "(25.0% of 24 rows; first: " in said and "rows.csv:5)" in said
    assert word.strip('" ') in said


def test_what_is_a_class_is_no_matter_of_doubt(tmp_path):
    assert "doubtful" not in prepared(tmp_path, table(["None", "a"]), labels=["None", "a"]).said()
    tagged = "".join(f'{{"tokens": ["a", "b"], "tags": ["\'\'", "{"XY"[n % 2]}"]}}\n' for n in range(24))
    assert "doubtful" not in prepared(tmp_path, tagged, "token_classification", kind="jsonl").said()
    many = "".join(
        json.dumps({"text": f"a {n}", "label": ["ab"[n % 2], *([""] if n < 3 else [])]}) + "\n" for n in range(24)
    )
    assert "doubtful: 3 labels ''" in prepared(tmp_path, many, kind="jsonl", multi_label=True).said()


def test_classes_that_look_the_same_are_said_with_their_letters(tmp_path):
    said = prepared(tmp_path, table(["A", "\u0410", "b", ' "b"'])).said()
    assert r"'\u0410' (" in said and "'A' (" in said
    assert """'"b"'""" in said.partition("may be one")[2]
    assert near_duplicates({"вода": 3, "Вода": 4, "tea": 1}) == [("вода", "Вода")]


@given(st.text(max_size=12))
def test_a_name_is_normal_once(text):
    name = normalised(text)
    assert normalised(name) == name == unicodedata.normalize("NFC", name)


@given(st.integers(-(10**20), 10**20), st.integers(0, 5))
def test_numbers_are_their_value(number, zeros):
    assert normalised(f"{number}.{'0' * zeros}") == normalised(number) == str(number)
