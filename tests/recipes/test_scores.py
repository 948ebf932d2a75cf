"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from recipes.scores import (
    classification_scores,
    confusion,
    entity_scores,
    multi_label_scores,
    per_label,
    per_label_of_sets,
    regression_scores,
    span_scores,
    translation_scores,
)


def near(**expected):
    return pytest.approx(expected, abs=1e-6)  # torchmetrics counts in float32


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_importing_loads_no_library():
    code = """if True:
        import sys, recipes.scores
        assert not {"torch", "torchmetrics", "seqeval", "sacrebleu"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


# Classes


def test_classes():
    predicted, labels = [0, 0, 1, 1, 2, 0], [0, 0, 0, 1, 2, 2]
    # F1: class 0 has 2 right, 3 predicted, 3 labels → 2/3; class 1: 1, 2, 1 → 2/3; class 2: 1, 1, 2 → 2/3.
    # Matthews: (c·s − Σ p·t) / √((s² − Σp²)(s² − Σt²)) with c=4, s=6, p=(3,2,1), t=(3,1,2): (24−13)/√(22·22).
    scores = classification_scores(predicted, labels, 3)
    assert scores == near(accuracy=4 / 6, macro_f1=2 / 3, mcc=0.5)
    assert confusion(predicted, labels, 3) == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert per_label(predicted, labels, ["a", "b", "c"]) == [
        {"label": "a", "precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3),
         "f1": pytest.approx(2 / 3), "support": 3},
        {"label": "b", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        {"label": "c", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
    ]  # fmt: skip
    json.dumps([scores, confusion(predicted, labels, 3), per_label(predicted, labels, ["a", "b", "c"])])
    assert all(type(value) is float for value in scores.values())


def test_two_classes():
    # tp=3, fn=1, fp=2, tn=4: Matthews (3·4 − 2·1) / √(5·4·6·5); F1: 6/9 and 8/11.
    predicted, labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1] * 4 + [0] * 6
    scores = classification_scores(predicted, labels, 2)
    assert scores == near(accuracy=0.7, macro_f1=(6 / 9 + 8 / 11) / 2, mcc=10 / math.sqrt(600))


def test_empty_classes():
    # Class 2 and 3 never occur: left out. Class 1 is predicted but no label: 0.
    assert classification_scores([0, 0, 1], [0, 0, 0], 4) == near(accuracy=2 / 3, macro_f1=(0.8 + 0) / 2, mcc=0.0)
    rows = per_label([0, 0, 1], [0, 0, 0], ["a", "b", "c", "d"])
    assert [(row["precision"], row["recall"], row["f1"], row["support"]) for row in rows[1:]] == [(0, 0, 0, 0)] * 3
    assert classification_scores([0, 0, 0, 1], [0, 0, 0, 0], 2)["mcc"] == 0.0
    assert classification_scores([1, 1], [1, 1], 2) == near(accuracy=1.0, macro_f1=1.0, mcc=0.0)
    assert classification_scores([0, 0], [0, 0], 1) == near(accuracy=1.0, macro_f1=1.0, mcc=0.0)
    assert confusion([0, 0], [0, 0], 1) == [[2]] and per_label([0], [0], ["a"])[0]["f1"] == 1.0
    assert classification_scores([1, 0], [0, 1], 2) == near(accuracy=0.0, macro_f1=0.0, mcc=-1.0)


def test_several_classes_per_row():
    predicted = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    labels = [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    # Class 0: 2 right, 2 predicted, 3 labels → 4/5; class 1: 1, 2, 1 → 2/3; class 2: nothing → 0. All: 3, 4, 4 → 6/8.
    scores = multi_label_scores(predicted, labels, 3)
    assert scores == near(accuracy=0.5, macro_f1=(0.8 + 2 / 3) / 3, micro_f1=0.75)
    assert all(type(value) is float for value in scores.values())
    assert per_label_of_sets(predicted, labels, ["a", "b", "c"]) == [
        {"label": "a", "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3},
        {"label": "b", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]
    assert per_label_of_sets([[1], [0]], [[1], [1]], ["a"])[0]["recall"] == 0.5
    assert multi_label_scores([[0, 0]], [[0, 0]], 2) == near(accuracy=1.0, macro_f1=0.0, micro_f1=0.0)
    assert multi_label_scores([[1], [1], [0]], [[1], [0], [0]], 1) == near(
        accuracy=2 / 3, macro_f1=2 / 3, micro_f1=2 / 3
    )


# Entities and tags


def test_entities():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"], ["B-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-ORG"], ["O", "O"]]
    # 3 predicted (PER, ORG, ORG), 4 labels (PER, LOC, ORG, LOC), 2 right; 6 of 8 tokens.
    scores = entity_scores(predicted, labels)
    assert scores == near(precision=2 / 3, recall=0.5, f1=4 / 7, token_accuracy=0.75)
    assert all(type(value) is float for value in scores.values())
    # A part of an entity is not the entity.
    assert entity_scores([["B-PER", "O"]], [["B-PER", "I-PER"]])["f1"] == 0.0


def test_entities_without_their_beginning():
    labels, predicted = [["O", "I-PER", "I-PER"]], [["O", "B-PER", "I-PER"]]
    assert entity_scores(predicted, labels) == near(precision=1.0, recall=1.0, f1=1.0, token_accuracy=2 / 3)
    assert entity_scores(predicted, labels, "IOB2") == near(precision=0.0, recall=0.0, f1=0.0, token_accuracy=2 / 3)


def test_entities_in_other_schemes():
    labels = [["U-A", "U-A", "B-A", "L-A", "O", "B-B", "I-B", "L-B"]]
    predicted = [["U-A", "O", "B-A", "L-A", "O", "B-B", "L-B", "O"]]
    # 4 labels, 3 predicted, 2 right.
    expected = near(precision=2 / 3, recall=0.5, f1=4 / 7, token_accuracy=5 / 8)
    assert entity_scores(predicted, labels) == expected == entity_scores(predicted, labels, "BILOU")
    bioes = {"U": "S", "L": "E"}
    labels, predicted = ([[bioes.get(t[0], t[0]) + t[1:] for t in row] for row in rows] for rows in (labels, predicted))
    assert entity_scores(predicted, labels) == expected == entity_scores(predicted, labels, "IOBES")


def test_no_entities():
    assert entity_scores([["O", "O"]], [["O", "O"]]) == near(precision=0.0, recall=0.0, f1=0.0, token_accuracy=1.0)
    assert entity_scores([["B-A"]], [["O"]]) == near(precision=0.0, recall=0.0, f1=0.0, token_accuracy=0.0)


def test_plain_tags():
    labels, predicted = [["DT", "NN"], ["NN", "VB"]], [["DT", "NN"], ["DT", "JJ"]]
    # F1: DT 1 right, 2 predicted, 1 label → 2/3; NN 1, 1, 2 → 2/3; VB 0; JJ 0.
    assert entity_scores(predicted, labels) == near(token_accuracy=0.5, macro_f1=(2 / 3 + 2 / 3) / 4)
    assert entity_scores([["O", "B-A"]], [["O", "O"]], "plain") == near(token_accuracy=0.5, macro_f1=(2 / 3) / 2)


# Answers, translations, numbers


def test_answers():
    answers = {"a": ["the Eiffel Tower"], "b": ["in 1889", "1889"], "c": ["red green blue"], "d": ["no"]}
    predicted = {"a": "Eiffel tower!", "b": "1889", "c": "green blue sky white", "d": ""}
    # c: 2 words agree of 4 predicted and 3 wanted → 2·2/(4+3).
    scores = span_scores(predicted, answers)
    assert scores == near(exact_match=0.5, f1=(1 + 1 + 4 / 7 + 0) / 4)
    assert all(type(value) is float for value in scores.values())


def test_questions_without_an_answer():
    answers = {1: [], 2: [], 3: ["yes"], 4: ["yes"]}
    assert span_scores({1: "", 2: "guess", 3: "yes", 4: ""}, answers) == near(exact_match=0.5, f1=0.5)
    assert span_scores({1: " the. "}, {1: []}) == near(exact_match=1.0, f1=1.0)


def test_every_question_is_answered_for():
    with pytest.raises(ValueError, match="no prediction for 1 questions: 'b'"):
        span_scores({"a": "x", "c": "y"}, {"a": ["x"], "b": ["y"]})


def test_translations():
    same = ["the cat sat on the mat", "a dog"]
    assert translation_scores(same, same) == near(bleu=100.0, chrf=100.0)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; equal lengths, so no brevity penalty.
    scores = translation_scores(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert 50 < scores["chrf"] < 100 and all(type(value) is float for value in scores.values())
    # Half the words: the brevity penalty is exp(1 − 8/4), everything else is right.
    scores = translation_scores(["one two three four"], ["one two three four five six seven eight"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(-1))
    assert translation_scores(["", ""], same) == near(bleu=0.0, chrf=0.0)
    # Character F2 with n-grams of one character only: precision 1/1, recall 1/2 → 5·P·R/(4P+R) = 2.5/4.5.
    assert translation_scores(["a"], ["ab"])["chrf"] == pytest.approx(100 * 2.5 / 4.5)


def test_numbers():
    # Residuals 1, 0, −1: mse 2/3; targets vary by 2 + 0 + 2 = 8 in squares: r2 = 1 − 2/8.
    scores = regression_scores([2.0, 3.0, 4.0], [1.0, 3.0, 5.0])
    assert scores == near(mse=2 / 3, r2=0.75) and all(type(value) is float for value in scores.values())
    assert regression_scores([5.0, 3.0, 1.0], [1.0, 3.0, 5.0]) == near(mse=32 / 3, r2=-3.0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_explained_variance_has_no_scale(scale):
    scores = regression_scores([2.0 * scale, 3.0 * scale, 4.0 * scale], [1.0 * scale, 3.0 * scale, 5.0 * scale])
    assert scores["r2"] == pytest.approx(0.75) and scores["mse"] == pytest.approx(2 / 3 * scale**2)


def test_variance_that_does_not_exist():
    assert regression_scores([1.0], [3.0]) == near(mse=4.0, r2=0.0)
    assert regression_scores([3.0], [3.0]) == near(mse=0.0, r2=1.0)
    assert regression_scores([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]) == near(mse=0.0, r2=1.0)
    assert regression_scores([0.1, 0.1, 0.2], [0.1, 0.1, 0.1])["r2"] == 0.0
    assert regression_scores([0.0, 1.0], [0.0, 1e-200])["r2"] == 0.0
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not a finite number"):
            regression_scores([bad, 1.0], [1.0, 2.0])


# Wrong calls


@pytest.mark.parametrize(
    ("score", "extra"),
    [
        (classification_scores, (2,)),
        (confusion, (2,)),
        (per_label, (["a", "b"],)),
        (entity_scores, ()),
        (translation_scores, ()),
        (regression_scores, ()),
    ],
)
def test_rows_of_both_lists(score, extra):
    with pytest.raises(ValueError, match="0 predictions for 0 rows"):
        score([], [], *extra)
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        score([0], [0, 1], *extra)


def test_values_that_are_none():
    with pytest.raises(ValueError, match="classes are 0 … 1"):
        classification_scores([2], [0], 2)
    with pytest.raises(ValueError, match="classes are 0 … 1"):
        confusion([0], [-100], 2)
    with pytest.raises(ValueError, match="a row is 2 numbers"):
        multi_label_scores([[1, 0, 1]], [[1, 0, 1]], 2)
    with pytest.raises(ValueError, match="0 or 1; not"):
        multi_label_scores([[1, 2]], [[1, 0]], 2)
    with pytest.raises(ValueError, match="row 1: 1 predicted tags, 2 labels"):
        entity_scores([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="no row has a token"):
        entity_scores([[], []], [[], []])
    with pytest.raises(ValueError, match="no scheme IOB"):
        entity_scores([["O"]], [["O"]], "IOB")
    with pytest.raises(ValueError, match="0 predictions for 0 rows"):
        span_scores({}, {})
