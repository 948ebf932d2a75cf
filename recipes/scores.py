"""Metrics of every task, computed by the libraries that define them: plain lists in, plain floats out, never a nan.

Lists without rows, or of unequal lengths, raise ValueError. The libraries are imported where they are used:
torchmetrics alone takes seconds, and no task needs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from recipes.data.conll import is_entity_tag


def classification_scores(predicted: list[int], labels: list[int], classes: int) -> dict[str, float]:
    """One class of 0 … classes-1 per row: accuracy, macro_f1 (0..1) and mcc, Matthews' correlation (-1..1).

    A class that neither is a label nor was predicted is left out of macro_f1; one that is only one of the two counts 0.
    mcc is 0 where it is not defined: all labels, or all predictions, are the same class.
    """
    from sklearn.metrics import matthews_corrcoef  # torchmetrics counts in float32: 1% off for a million rows
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    pair = _class_tensors(predicted, labels, classes)
    classes = max(classes, 2)  # torchmetrics knows no single class; one that never occurs changes nothing
    constant = min(len(set(predicted)), len(set(labels))) == 1
    return {
        "accuracy": float(multiclass_accuracy(*pair, num_classes=classes, average="micro")),
        "macro_f1": float(multiclass_f1_score(*pair, num_classes=classes, average="macro")),
        "mcc": 0.0 if constant else float(matthews_corrcoef(labels, predicted)),
    }


def multi_label_scores(predicted: list[list[int]], labels: list[list[int]], classes: int) -> dict[str, float]:
    """Any number of classes per row, as 0/1 matrices (rows × classes): accuracy (all classes of a row are right),
    macro_f1 (mean over classes) and micro_f1 (over all entries), each 0..1.

    A class that neither is a label nor was predicted counts 0 in macro_f1; micro_f1 is 0 when there is no 1 at all.
    """
    from torchmetrics.functional.classification import (
        binary_accuracy,
        binary_f1_score,
        multilabel_exact_match,
        multilabel_f1_score,
    )

    pair = _label_tensors(predicted, labels, classes)
    if classes == 1:  # torchmetrics wants two labels or more
        f1 = float(binary_f1_score(*pair))
        return {"accuracy": float(binary_accuracy(*pair)), "macro_f1": f1, "micro_f1": f1}
    return {
        "accuracy": float(multilabel_exact_match(*pair, num_labels=classes)),
        "macro_f1": float(multilabel_f1_score(*pair, num_labels=classes, average="macro")),
        "micro_f1": float(multilabel_f1_score(*pair, num_labels=classes, average="micro")),
    }


def confusion(predicted: list[int], labels: list[int], classes: int) -> list[list[int]]:
    """Rows with label i for which j was predicted, at [i][j]; classes × classes."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    pair = _class_tensors(predicted, labels, classes)
    matrix = multiclass_confusion_matrix(*pair, num_classes=max(classes, 2))
    return matrix[:classes, :classes].tolist()


def per_label(predicted: list[int], labels: list[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """{"label": its name, "precision", "recall", "f1" (0..1), "support" (rows with this label)} of each class.

    Precision is 0 for a class that was never predicted, recall for one without rows, and f1 where both are 0.
    """
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    pair = _class_tensors(predicted, labels, len(names))
    metrics = {"precision": multiclass_precision, "recall": multiclass_recall, "f1": multiclass_f1_score}
    classes = max(len(names), 2)
    values = {name: score(*pair, num_classes=classes, average="none").tolist() for name, score in metrics.items()}
    return [
        {"label": label, **{name: value[i] for name, value in values.items()}, "support": labels.count(i)}
        for i, label in enumerate(names)
    ]


def per_label_of_sets(
    predicted: list[list[int]], labels: list[list[int]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """`per_label` where a row has any number of classes, as 0/1 matrices (rows × classes)."""
    from sklearn.metrics import precision_recall_fscore_support

    # The classes are named one by one: a matrix of a single column would be taken for plain labels.
    found = [
        precision_recall_fscore_support(right, told, labels=[1], zero_division=0)
        for right, told in zip(zip(*labels, strict=True), zip(*predicted, strict=True), strict=True)
    ]
    return [
        {"label": label, "precision": float(precision[0]), "recall": float(recall[0]), "f1": float(f1[0]),
         "support": int(support[0])}
        for label, (precision, recall, f1, support) in zip(names, found, strict=True)
    ]  # fmt: skip


def entity_scores(predicted: list[list[str]], labels: list[list[str]], scheme: str | None = None) -> dict[str, float]:
    """Tags of each row's tokens. Entities give precision, recall, f1 (micro: over all entities of all types) and
    token_accuracy; plain tags (no prefixes, such as parts of speech) give token_accuracy and macro_f1. All 0..1.

    scheme: None: entities as conlleval reads them in any of IOB1, IOB2, BIOES and BILOU (seqeval's default mode), or
    plain tags when a label is neither `O` nor PREFIX-TYPE; "plain": plain tags; "IOB2", "IOBES", "BILOU", …: seqeval's
    strict mode, in which what breaks the scheme is no entity.
    Precision is 0 when no entity was predicted, recall when there is none, and f1 when either is.
    """
    _same_length(predicted, labels)
    for i, (row, label) in enumerate(zip(predicted, labels, strict=True)):
        if len(row) != len(label):
            raise ValueError(f"row {i}: {len(row)} predicted tags, {len(label)} labels")
    if not any(labels):
        raise ValueError("no row has a token")
    if scheme == "plain" or (scheme is None and not all(is_entity_tag(tag) for row in labels for tag in row)):
        return _tag_scores([tag for row in predicted for tag in row], [tag for row in labels for tag in row])

    from seqeval import scheme as schemes
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    mode: dict[str, Any] = {"zero_division": 0}
    if scheme is None:
        predicted, labels = [_bioes(row) for row in predicted], [_bioes(row) for row in labels]
    elif hasattr(schemes, scheme):
        mode |= {"mode": "strict", "scheme": getattr(schemes, scheme)}
    else:
        raise ValueError(f"seqeval has no scheme {scheme}")
    metrics = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    scores = {name: float(score(labels, predicted, **mode)) for name, score in metrics.items()}
    return scores | {"token_accuracy": float(accuracy_score(labels, predicted))}


def span_scores(predicted: Mapping[Any, str], answers: Mapping[Any, list[str]]) -> dict[str, float]:
    """Texts that answer questions, by the question's id: exact_match and f1 (0..1) as SQuAD defines them.

    Both compare without case, punctuation and articles, and take the best of a question's answers. A question without
    an answer (SQuAD v2: an empty list) scores 1 when the prediction is empty after that, and 0 when it is not.
    Raises ValueError when the questions of the two are not the same.
    """
    from torchmetrics.functional.text import squad

    _same_length(list(predicted), list(answers))
    if lost := [repr(question) for question in answers if question not in predicted]:
        raise ValueError(f"no prediction for {len(lost)} questions: {', '.join(lost[:5])}")
    given = [{"id": question, "prediction_text": text} for question, text in predicted.items()]
    # torchmetrics compares an empty prediction with an empty answer as SQuAD v2 does.
    wanted = [
        {"id": question, "answers": {"text": list(texts) or [""], "answer_start": [0] * max(len(texts), 1)}}
        for question, texts in answers.items()
    ]
    percent = squad(given, wanted)
    return {name: float(percent[name]) / 100 for name in ("exact_match", "f1")}


def translation_scores(predicted: list[str], references: list[str], tokens: str = "13a") -> dict[str, float]:
    """bleu and chrf (chrF2) of the whole corpus, one reference per row, 0..100, as sacrebleu has them.

    tokens: what BLEU counts, by sacrebleu's name. bleu is 0 when no word agrees, or every prediction is empty;
    short corpora without a common 4-gram are smoothed (sacrebleu's `exp`).
    """
    import sacrebleu

    _same_length(predicted, references)
    return {
        "bleu": float(sacrebleu.corpus_bleu(predicted, [references], tokenize=tokens).score),
        "chrf": float(sacrebleu.corpus_chrf(predicted, [references]).score),
    }


def regression_scores(predicted: list[float], targets: list[float]) -> dict[str, float]:
    """mse (in the targets' unit squared) and r2, the share of the targets' variance that is explained (at most 1).

    r2 is not defined for a single row or for targets that are all the same: it is 1 then if every prediction is equal
    to its target, and 0 if not. Raises ValueError for a number that is not finite. Two sums and no library: the
    smallest recipe would spend a tenth of its time on loading one.
    """
    _same_length(predicted, targets)
    if not all(map(math.isfinite, (*predicted, *targets))):
        raise ValueError("a prediction or a target is not a finite number")
    middle = math.fsum(targets) / len(targets)
    errors = [told - right for told, right in zip(predicted, targets, strict=True)]
    wrong = math.fsum(error * error for error in errors)
    varying = math.fsum((right - middle) * (right - middle) for right in targets)
    # 0.1 and 0.1 and 0.1 differ from their mean in its last bit, and the square of 1e-200 is 0, of 1e200 infinite.
    defined = 0 < varying < math.inf and min(targets) < max(targets)
    return {"mse": wrong / len(targets), "r2": 1 - wrong / varying if defined else float(predicted == targets)}


def _tag_scores(predicted: list[Hashable], labels: list[Hashable]) -> dict[str, float]:
    numbers = {tag: i for i, tag in enumerate(dict.fromkeys([*labels, *predicted]))}
    scores = classification_scores([numbers[tag] for tag in predicted], [numbers[tag] for tag in labels], len(numbers))
    return {"token_accuracy": scores["accuracy"], "macro_f1": scores["macro_f1"]}


def _bioes(tags: list[str]) -> list[str]:
    """BILOU's prefixes in those of BIOES: seqeval 1.2.2's default mode does not know L- and U-, and joins U- to U-."""
    return [{"L-": "E-", "U-": "S-"}.get(tag[:2], tag[:2]) + tag[2:] for tag in tags]


def _class_tensors(predicted: list[int], labels: list[int], classes: int) -> tuple[Any, Any]:
    import torch

    _same_length(predicted, labels)
    if min(*predicted, *labels) < 0 or max(*predicted, *labels) >= classes:
        raise ValueError(f"classes are 0 … {classes - 1}")
    return torch.tensor(predicted), torch.tensor(labels)


def _label_tensors(predicted: list[list[int]], labels: list[list[int]], classes: int) -> tuple[Any, Any]:
    import torch

    _same_length(predicted, labels)
    for row in (*predicted, *labels):
        if len(row) != classes or not set(row) <= {0, 1}:
            raise ValueError(f"a row is {classes} numbers, 0 or 1; not {row}")
    return torch.tensor(predicted), torch.tensor(labels)


def _same_length(predicted: Sequence[Any], labels: Sequence[Any]) -> None:
    if len(predicted) != len(labels) or not labels:
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} rows; at least one row is needed")
