"""Where in a text the answer to a question stands; texts longer than the model are read in windows that overlap."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import Problem
from conf.rules_values import changed
from recipes.base import Prediction, Progress
from recipes.data.changes import CUT, DROPPED
from recipes.data.examples import Example
from recipes.data.readable import Reading
from recipes.data.rows import Meter, Problems, Row, check_content
from recipes.data.sources import Source
from recipes.data.squad import misplaced
from recipes.data.tokenizer import without_begin
from recipes.supervised import IGNORE, RECORDS
from recipes.text import TextTask

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

AROUND = 8
"""Tokens of a window that are neither question nor shared with the next one, at least: special ones, and new text."""
LONGEST_ANSWER = 30
"""Tokens of a predicted answer at most."""
NO_ANSWER = "no answer"
NONE_IS_AN_ANSWER = "none_is_an_answer"
"""Of a configuration: the model was trained on questions without an answer, too."""
KINDS_OF_VALUE = {str: "texts", int: "numbers"}


class QuestionAnswering(TextTask):
    """Start and end of the answer; the first token stands for no answer in this window (Devlin et al. 2018)."""

    KINDS = {  # noqa: RUF012 - never changed
        "stdlib": "recipes.data.parameters:ParametersSource",
        "squad": "recipes.data.squad:SquadSource",
        **{kind: reader for kind, reader in RECORDS.items() if kind != "csv"},
    }
    KEYS = ("question", "context", "answers", "stride")
    UNUSED = (*TextTask.UNUSED, "data.overlong")
    ALSO = ("id",)
    CLASSES = False  # whether a question has an answer is read from the span
    ARRAYS = {  # noqa: RUF012
        **TextTask.ARRAYS, "labels": "int32", "spans": "int32",
        "context": "uint8", "answers": "uint8", "question": "uint8", "first": "int8",
    }  # fmt: skip
    METRICS = {"loss": "min", "f1": "max", "exact_match": "max"}  # noqa: RUF012

    def check(self) -> list[Problem]:
        data = self.cfg.data
        if changed(data, "stride") and data.stride >= data.seq_length:
            rule = f"windows of data.seq_length={data.seq_length} tokens cannot share as many"
            return [Problem("data.stride", str(data.stride), rule, f"data.stride={data.seq_length // 4}")]
        return super().check()

    def columns(self) -> dict[str, str]:
        data = self.cfg.data
        return {
            "question": data.question or "question",
            "context": data.context or "context",
            "answers": data.answers or "answers",
        }

    def check_values(self, content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
        problems = check_content({name: content[name] for name in ("question", "context")}, where, columns)
        answers, both = content["answers"], ("text", "answer_start")
        if isinstance(answers, list) and all(isinstance(one, dict) and one.keys() >= set(both) for one in answers):
            answers = {name: [one[name] for one in answers] for name in both}  # as SQuAD's files have them
        if not isinstance(answers, dict) or not answers.keys() >= set(both):
            rule = f"column '{columns['answers']}' must be an object with lists text and answer_start"
            return [*problems, Problem(where, repr(answers)[:60], rule)]
        texts, starts = answers["text"], answers["answer_start"]
        for name, values, kind in (("text", texts, str), ("answer_start", starts, int)):
            if not isinstance(values, list) or not all(type(value) is kind for value in values):
                rule = f"{name} in column '{columns['answers']}' must be a list of {KINDS_OF_VALUE[kind]}"
                return [*problems, Problem(where, repr(values)[:60], rule)]
        if len(texts) != len(starts):
            return [*problems, Problem(where, "", f"{len(texts)} answers, {len(starts)} values of answer_start")]
        found = []
        for text, start in zip(texts, starts, strict=True):
            if not text.strip():
                problems.append(Problem(where, repr(text), "an answer is empty", "[] where there is none"))
            elif not problems and (wrong := misplaced(text, start, content["context"], where)):
                problems.append(wrong)
            found.append({"text": text, "start": start})
        content["answers"] = found
        return problems

    def labels_of(self, content: dict[str, Any]) -> Iterator[Any]:
        if not content["answers"]:
            yield NO_ANSWER

    def texts(self, content: dict[str, Any]) -> Iterator[str]:
        yield content["question"]
        yield content["context"]

    def ready(self, root: Path, source: Source, fingerprint: str, progress: Progress) -> list[str]:
        self.labels, self._may_be_none = [], bool(self._counts)
        return super().ready(root, source, fingerprint, progress)

    def encode(self, rows: Sequence[Row], problems: Problems, meter: Meter) -> list[list[Example]]:
        questions = without_begin(self.tokenizer, [row.content["question"].strip() for row in rows])
        contexts = [row.content["context"] for row in rows]
        limit = self.cfg.data.seq_length
        asked = [len(ids) for ids in self.tokenizer(questions, verbose=False)["input_ids"]]
        half = limit // 2
        for row, length in zip(rows, asked, strict=True):
            if length > half or limit - length <= AROUND:
                rule = f"the question alone has {length} tokens, too many for data.seq_length={limit}"
                nearest = f"data.seq_length={-(-max(2 * length, length + 2 * AROUND) // 8) * 8}"
                problems.add(Problem(row.where, "", rule, nearest))
        if max(asked) > half or limit - max(asked) <= AROUND:
            return [[] for _ in rows]
        alike: dict[int, list[int]] = {}  # a long question leaves less room for windows that overlap
        for number, length in enumerate(asked):
            alike.setdefault(min(self.cfg.data.stride, limit - length - AROUND), []).append(number)
        examples: list[list[Example]] = [[] for _ in rows]
        for stride, numbers in alike.items():
            found = self.tokenizer(
                [questions[number] for number in numbers], [contexts[number] for number in numbers],
                truncation="only_second", max_length=limit, return_overflowing_tokens=True,
                return_offsets_mapping=True, stride=stride,
            )  # fmt: skip
            for window, place in enumerate(found["overflow_to_sample_mapping"]):
                windows = examples[numbers[place]]
                first = np.array([not windows], np.int8)
                windows.append({**self._window(rows[numbers[place]], found, window), "first": first})
        for row, windows in zip(rows, examples, strict=True):
            if any(window["labels"][1] - window["labels"][0] >= LONGEST_ANSWER for window in windows):
                what = f"answers of more than {LONGEST_ANSWER} tokens, of which no more are predicted"
                meter.note(CUT, what, row.where)
            if row.content["answers"] and not any(window["labels"].any() for window in windows):
                what = "questions whose answer is whole in no window, learned as having none"
                whole = self.tokenizer(row.content["question"].strip(), row.content["context"], verbose=False)
                meter.note(DROPPED, what, row.where, len(whole["input_ids"]))
        return examples

    def _window(self, row: Row, found: Any, window: int) -> Example:
        """One window. spans: (T, 2) characters of the context that each of its tokens covers, -1 for other tokens."""
        of_context = np.array([part == 1 for part in found.sequence_ids(window)])
        spans = np.where(of_context[:, None], np.array(found["offset_mapping"][window]), -1)
        content, label = row.content, (0, 0)
        if content["answers"]:
            text = content["answers"][0]["text"]
            start = content["answers"][0]["start"] + len(text) - len(text.lstrip())
            stop = start + len(text.strip())  # no token is of spaces alone
            touched = np.flatnonzero(of_context & (spans[:, 0] < stop) & (spans[:, 1] > start))
            if len(touched) and spans[touched[0], 0] <= start and spans[touched[-1], 1] >= stop:
                label = (int(touched[0]), int(touched[-1]))
        texts = {
            "context": content["context"],
            "answers": json.dumps([answer["text"] for answer in content["answers"]]),
            "question": str(content.get("id", row.where)),
        }
        ids = np.array(found["input_ids"][window], np.int32)
        kinds = found["token_type_ids"][window] if "token_type_ids" in found else [0] * len(ids)
        return {
            "input_ids": ids, "token_type_ids": np.array(kinds, np.int8), "labels": np.array(label, np.int32),
            "spans": spans.astype(np.int32), **{name: _bytes(text) for name, text in texts.items()},
        }  # fmt: skip

    def measure(self, reading: Reading, row: Row, examples: list[Example]) -> None:
        super().measure(reading, row, examples)
        answers = [answer["text"] for answer in row.content["answers"]]
        if not answers:
            return
        wanted = {_as_scored(text) for text in answers}
        nothing = wanted == {""}
        what = "questions of whose answer the metric leaves nothing (articles, punctuation)"
        reading.targets(row.where, what, int(nothing), 1, answers[0])
        for window in examples:
            first, last = window["labels"]
            spans = window["spans"].reshape(-1, 2)
            if last:  # an answer that is whole in no window is counted elsewhere
                text = row.content["context"][spans[first, 0] : spans[last, 1]]
                what = "questions whose answer is no span of tokens"
                reading.targets(row.where, what, int(not nothing and _as_scored(text) not in wanted), 1, answers[0])
                return

    def marked(self, row: Example) -> tuple[Sequence[int], list[str | None]]:
        first, last = row["labels"]
        of_answer = [first <= place <= last for place in range(len(row["input_ids"]))]
        name = "" if last else NO_ANSWER
        return row["input_ids"].tolist(), [name if one else None for one in of_answer]

    def set_heads(self, config: PretrainedConfig) -> None:
        super().set_heads(config)
        if self.finished and hasattr(config, NONE_IS_AN_ANSWER):
            self._may_be_none = bool(getattr(config, NONE_IS_AN_ANSWER))  # the model's, whatever rows are beside it
        setattr(config, NONE_IS_AN_ANSWER, self._may_be_none)

    def hf_class(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def collate_labels(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        labels = np.full((size, 2), IGNORE, np.int64)
        for number, row in enumerate(rows):
            labels[number] = row["labels"]
        return {"labels": labels}

    def collate(self, rows: Sequence[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
        batch = super().collate(rows, size)
        batch["of_context"] = np.zeros_like(batch["input_ids"])
        for number, row in enumerate(rows):
            spans = row["spans"].reshape(-1, 2)
            batch["of_context"][number, : len(spans)] = spans[:, 0] >= 0
        return batch

    def widen(self, batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
        wider = super().widen(batch, width)
        missing = width - batch["of_context"].shape[1]
        return {**wider, "of_context": np.pad(batch["of_context"], ((0, 0), (0, missing)))}

    def count(self, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
        return int((batch["labels"][:, 0] != IGNORE).sum()), self.real_tokens(batch)

    def summed_loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from torch.nn import functional as F

        total = outputs.start_logits.new_zeros((), dtype=None).float()
        for side, logits in enumerate((outputs.start_logits, outputs.end_logits)):
            masked = logits.float().masked_fill(batch["attention_mask"] == 0, -1e9)
            total = total + F.cross_entropy(masked, batch["labels"][:, side], ignore_index=IGNORE, reduction="sum")
        return total / 2

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        import torch

        start, end = outputs.start_logits.float(), outputs.end_logits.float()
        outside = batch["of_context"] == 0
        scores = start.masked_fill(outside, -1e9)[:, :, None] + end.masked_fill(outside, -1e9)[:, None, :]
        size = scores.shape[1]
        legal = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu().tril(LONGEST_ANSWER - 1)
        best, place = scores.masked_fill(~legal, -4e9).flatten(1).max(1)
        spans = torch.stack([place // size, place % size], 1)
        none = start[:, 0] + end[:, 0]
        return {"span": spans.cpu().numpy(), "score": best.cpu().numpy(), "none": none.cpu().numpy()}

    def predictions(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> list[Prediction]:
        found = []
        for number in np.flatnonzero(batch["id"] >= 0):
            window = int(batch["id"][number])
            row = self.held_out.row(window)
            spans, (first, last) = row["spans"].reshape(-1, 2), outputs["span"][number]
            text = _text(row["context"])[spans[first, 0] : spans[last, 1]].strip()
            score, none = float(outputs["score"][number]), float(outputs["none"][number])
            found.append(
                {
                    "id": window, "prediction": text, "label": json.loads(_text(row["answers"])),
                    "question": _text(row["question"]), "_score": score, "_none": none, "_first": bool(row["first"][0]),
                }
            )  # fmt: skip
        return found

    def merged(self, predictions: Sequence[Prediction]) -> list[Prediction]:
        answers = []
        starts = [number for number, row in enumerate(predictions) if row["_first"]]  # ids may be there twice
        for start, stop in itertools.pairwise([*starts, len(predictions)]):
            parts = predictions[start:stop]
            best = max(parts, key=lambda row: row["_score"])
            # No answer where even the window that looks most like having one says so (Rajpurkar et al. 2018).
            empty = self._may_be_none and min(row["_none"] for row in parts) > best["_score"]
            answers.append(
                {"id": parts[0]["question"], "prediction": "" if empty else best["prediction"], "label": best["label"]}
            )
        return answers

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        from recipes.scores import span_scores

        numbered = list(enumerate(predictions))
        return span_scores({n: row["prediction"] for n, row in numbered}, {n: row["label"] for n, row in numbered})


def _as_scored(text: str) -> str:
    """An answer as SQuAD compares it (Rajpurkar et al. 2016): without case, punctuation, articles."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _text(values: np.ndarray) -> str:
    return values.tobytes().decode()


recipe = QuestionAnswering
