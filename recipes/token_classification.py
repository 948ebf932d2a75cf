"""Which class each token of a text has: entities, parts of speech, lexical classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from recipes.base import Prediction
from recipes.data.changes import DROPPED
from recipes.data.examples import Example
from recipes.data.readable import Reading
from recipes.data.rows import Meter, Problems, Row, check_content
from recipes.data.tokenizer import spaces_are_of_words
from recipes.data.values import wrong_text
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch


OF_ENTITIES = ("f1", "precision", "recall")
OF_TAGS = ("macro_f1",)
"""Metrics that only tags of entities have, and only other ones."""


class TokenClassification(TextTask):
    """The first piece of each token carries its class; the other pieces are not supervised."""

    KINDS = {  # noqa: RUF012 - never changed
        "stdlib": "recipes.data.lexical:LexicalSource",
        "conll": "recipes.data.conll:ConllSource",
        **{kind: reader for kind, reader in RECORDS.items() if kind != "csv"},
    }
    KEYS = ("tokens", "label", "labels")
    ARRAYS = {**TextTask.ARRAYS, "labels": "int32", "tokens": "int32", "tags": "int32"}  # noqa: RUF012
    PADDED = {"labels": IGNORE, "tokens": -1}  # noqa: RUF012
    WINDOW = 1
    ENDS = False
    METRICS = {  # noqa: RUF012
        "loss": "min", "f1": "max", "precision": "max", "recall": "max", "token_accuracy": "max", "macro_f1": "max",
    }  # fmt: skip

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {"tokens": data.tokens or "tokens", "tags": data.label or "tags"}

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        for name, kinds in (("tokens", str), ("tags", str | int)):
            value = content[name]
            fits = isinstance(value, list) and all(isinstance(one, kinds) for one in value)
            if name == "tags" and fits and any(str(one) == str(IGNORE) for one in value):
                rule = (
                    f"column '{columns[name]}' has {IGNORE}, which libraries take for no tag; each token has one here"
                )
                return [Problem(where, repr(value)[:60], rule, "the tags of words, before they are spread over pieces")]
            if not fits or (name == "tags" and any(map(_no_tag, value))):
                rule = f"column '{columns[name]}' must be a list of {'texts' if name == 'tokens' else 'tags'}"
                return [Problem(where, repr(value)[:60], rule)]
        if problems := check_content({"tokens": " ".join(content["tokens"])}, where, columns):
            return problems
        if len(content["tokens"]) != len(content["tags"]):
            rule = f"{len(content['tokens'])} tokens and {len(content['tags'])} tags"
            return [Problem(where, "", rule, "one tag for each token")]
        return []

    def is_empty(self, content: dict[str, Any]) -> bool:
        return not any(token.strip() for token in content["tokens"])

    def labels_of(self, content: dict[str, Any]) -> Iterator[Any]:
        yield from content["tags"]

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield " ".join(content["tokens"])

    @functools.cached_property
    def _spaced(self) -> bool:
        return spaces_are_of_words(self.tokenizer)

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        limit = self.cfg.data.seq_length
        tokens = [row.content["tokens"] for row in rows]
        if self._spaced:  # the space before a word is a part of it
            tokens = [[*words[:1], *(f" {word}" for word in words[1:])] for words in tokens]
        found = self.tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=limit)
        whole = self.tokenizer(tokens, is_split_into_words=True, verbose=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        self.overlong(lengths, [row.where for row in rows], problems, meter)
        examples: list[list[Example]] = []
        for number, row in enumerate(rows):
            numbers = [self.number_of(name, row.where, problems) for name in self.classes_of(row.content)]
            tags = np.array([IGNORE if one is None else one for one in numbers], np.int32)
            words = found.word_ids(number)
            first = np.array(
                [
                    -1 if word is None or word == before else word
                    for before, word in zip([None, *words], words, strict=False)
                ],
                np.int32,
            )
            if not row.held_out and not (first >= 0).any():
                meter.note(DROPPED, "rows whose first token is cut off", row.where)
                examples.append([])
                continue
            ids = np.array(found["input_ids"][number], np.int32)
            examples.append(
                [
                    {
                        "input_ids": ids, "token_type_ids": np.zeros(len(ids), np.int8), "tokens": first, "tags": tags,
                        "labels": np.where(first >= 0, tags[first], IGNORE),
                    }
                ]
            )  # fmt: skip
        return examples

    def measure(self, reading: Reading, row: Row, examples: list[Example]) -> None:
        super().measure(reading, row, examples)
        for example in examples:  # what is cut off is counted elsewhere
            seen = np.unique(example["tokens"][example["tokens"] >= 0])
            whole = len(example["input_ids"]) < self.cfg.data.seq_length
            words = len(row.content["tokens"]) if whole else int(seen.max(initial=-1)) + 1
            lost = sorted(set(range(words)) - set(seen.tolist()))
            what = "tokens of which the tokenizer leaves nothing, whose tags cannot be predicted"
            reading.targets(row.where, what, len(lost), words, row.content["tokens"][lost[0]] if lost else "")

    def marked(self, row: Example) -> tuple[Sequence[int], list[str | None]]:
        return row["input_ids"].tolist(), [None if one == IGNORE else self.labels[one] for one in row["labels"]]

    def hf_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def check_model(self) -> list[Problem]:
        """Also whether the held-out tags give the metric that decides: before anything is built."""
        from recipes.data.conll import is_entity_tag

        metric, rows = self.cfg.eval.metric, range(len(self.held_out))
        if metric in OF_ENTITIES + OF_TAGS:
            tags = {self.labels[tag] for row in rows for tag in self.held_out.row(row)["tags"]}
            other = next((tag for tag in sorted(tags) if not is_entity_tag(tag)), None)
            if metric in OF_ENTITIES and other is not None:
                rule = f"tags like '{other}' are no entities; with these data there are loss, token_accuracy, macro_f1"
                return [Problem("eval.metric", str(metric), rule, "eval.metric=macro_f1")]
            if metric in OF_TAGS and other is None:
                return [Problem("eval.metric", str(metric), "these tags are of entities", "eval.metric=f1")]
        return super().check_model()

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        return int((batch["labels"] != IGNORE).sum()), self.real_tokens(batch)

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional as F

        logits = outputs.logits.float().flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum")

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"classes": outputs.logits.argmax(-1).cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        found = []
        for number in np.flatnonzero(batch["id"] >= 0):
            row = int(batch["id"][number])
            tags = self.held_out.row(row)["tags"]
            # What was cut off is predicted to be the most frequent class, which for entities is outside of them.
            predicted = np.full(len(tags), self._usual)
            token = batch["tokens"][number]
            predicted[token[token >= 0]] = outputs["classes"][number][: len(token)][token >= 0]
            sides = [[self.labels[one] for one in side] for side in (predicted, tags)]
            found.append({"id": row, "prediction": sides[0], "label": sides[1]})
        return found

    @property
    def _usual(self) -> int:
        if "O" in self.labels:
            return self.labels.index("O")
        return max(range(len(self.labels)), key=lambda number: self._counts.get(self.labels[number], 0))

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import entity_scores

        return entity_scores([row["prediction"] for row in predictions], [row["label"] for row in predictions])

    def details(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        from recipes.scores import per_label

        tags = [
            {side: tag for side, tag in zip(("prediction", "label"), both, strict=True)}
            for row in predictions
            for both in zip(row["prediction"], row["label"], strict=True)
        ]
        return {"per_label": per_label(*self.sides(tags), self.labels)}


def _no_tag(value: str | int) -> bool:
    return isinstance(value, bool) or value == "" or bool(wrong_text(str(value)))


recipe = TokenClassification
