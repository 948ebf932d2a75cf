"""Questions with their answers in a context: the JSON files of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem, did_you_mean
from recipes.data.changes import DROPPED
from recipes.data.readers import _once, _TwiceError, read_document
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import FileSource
from recipes.data.streams import BrokenFileError, FileFormat, open_text
from recipes.data.values import kind_of, wrong_text

SHOWN = 60
"""Most characters of an answer or a title in a message."""
JSONL = "data.kind=jsonl for one object per line"
KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}
Content = dict[str, Any]


@dataclass(frozen=True)
class Article:
    """One element of `data`. place: where it stands, such as `FILE: data[3]`."""

    path: Path
    place: str
    value: Any


class SquadSource(FileSource):
    """{"id": str, "question": str, "context": str, "answers": [{"text": str, "start": int}]}.

    `start` counts characters of the context; an empty list: the context has no answer (`is_impossible` of SQuAD 2.0).
    Without `eval_path` the last articles are held out, so that no context is in both splits; the share is one of all
    articles, and they are all in memory before the first row. A single article is split by question.
    """

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        if self.config.eval_path is None:
            yield from self._read_and_split(problems, meter)
            return
        for held_out in (False, True):
            seen: dict[str, str] = {}
            for _, path in self.files(held_out):
                for article in articles(path, self.form, problems):
                    for where, content in questions(article, not held_out, seen, problems, meter, self._skips):
                        yield Row(where, held_out, content)
                meter.done += path.stat().st_size

    def _read_and_split(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        found = [article for _, path in self.files(False) for article in articles(path, self.form, problems)]
        seen: dict[str, str] = {}
        if len(found) == 1:
            rows = list(questions(found[0], True, seen, problems, meter, self._skips))
            if len(rows) == 1:
                rule = "a single question cannot be split, the last ones are held out"
                problems.add(Problem(f"{self.key}.path", str(self.config.path), rule, f"{self.key}.eval_path=FILE"))
                return
            cut = self._cut(len(rows))
            for number, (where, content) in enumerate(rows):
                yield Row(where, number >= cut, content)
        cut, total = self._cut(len(found)), self.size()
        for number, article in enumerate(found if len(found) > 1 else []):
            for where, content in questions(article, True, seen, problems, meter, self._skips):
                yield Row(where, number >= cut, content)
            meter.done = total * (number + 1) // len(found)
        meter.done = total

    @property
    def _skips(self) -> bool:
        return getattr(self.config, "empty", None) == "skip"

    def _cut(self, count: int) -> int:
        """How many of `count` (two or more) train: at least one, and one less than all at most."""
        return count - min(max(round(self.held_out * count), 1), count - 1)

    def _check_content(self, key: str, value: str, paths: list[Path], problems: Problems) -> None:
        for path in paths:
            stream, raw = open_text(path, self.form)
            try:
                with raw, stream:
                    start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            except BrokenFileError as error:
                problems.add(error.problem(path))
                continue
            if start != b"{":
                rule = f"{path} does not begin with {{, a SQuAD file is one JSON object"
                problems.add(Problem(key, value, rule, '{"data": [{"title": "…", "paragraphs": […]}]}'))


def articles(path: Path, form: FileFormat, problems: Problems) -> list[Article]:
    """The articles of a file, unchecked; none (and a problem) when it is not JSON or has no `data`."""
    text = read_document(path, form, problems)
    if text is None:
        return []
    try:
        document = json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        problems.add(Problem(str(path), "", f"the key '{error}' stands twice in one object"))
        return []
    except json.JSONDecodeError as error:
        rule = f"not valid JSON: {error.msg} at column {error.colno}"
        problems.add(Problem(f"{path}:{error.lineno}", "", rule, JSONL if error.msg == "Extra data" else ""))
        return []
    except ValueError as error:  # a number with thousands of digits
        problems.add(Problem(str(path), "", f"not valid JSON: {str(error).partition(';')[0]}"))
        return []
    except RecursionError:
        problems.add(Problem(str(path), "", "not valid JSON: nested too deeply"))
        return []
    data = _part(document, "data", list, str(path), problems)
    if data == []:
        problems.add(Problem(str(path), "", "there are no articles in it", '{"data": [{"paragraphs": […]}]}'))
    return [Article(path, f"{path}: data[{number}]", value) for number, value in enumerate(data or [])]


def questions(
    article: Article, trained: bool, seen: dict[str, str], problems: Problems, meter: Meter, skip: bool = False
) -> Iterator[tuple[str, Content]]:
    """(where, content) of each question of an article that is right; the broken ones go to `problems`.

    trained: of the training split, where an answerable question needs an answer; elsewhere one without is left out
    and counted, because it could only be scored as unanswerable. seen: id → place of the questions of this split.
    skip: questions that are blank, or whose context is, are counted instead.
    """
    paragraphs = _part(article.value, "paragraphs", list, article.place, problems)
    title = article.value.get("title") if isinstance(article.value, dict) else None
    suffix = f" ({title})" if isinstance(title, str) and 0 < len(title) <= SHOWN else ""
    for number, paragraph in enumerate(paragraphs or []):
        place = f"{article.place}.paragraphs[{number}]"
        blank = skip and _is_blank(paragraph, "context")
        context = "" if blank else _text(paragraph, "context", place, problems)
        asked = _part(paragraph, "qas", list, place, problems) if isinstance(paragraph, dict) else None
        for index, record in enumerate(asked or []):
            inside = f"{place}.qas[{index}]"
            if blank or (skip and _is_blank(record, "question")):
                meter.note(DROPPED, f"rows without '{'context' if blank else 'question'}'", inside)
                continue
            name = _text(record, "id", inside, problems)
            question = _text(record, "question", inside, problems) if isinstance(record, dict) else None
            if name is None or question is None or context is None:
                continue
            where = f"{article.path}: question {name}{suffix}"
            if name in seen:
                rule = f"the id of {inside.removeprefix(f'{article.path}: ')} is already that of {seen[name]}"
                problems.add(Problem(where, "", rule, "an id of its own for each question"))
                continue
            seen[name] = inside
            found = _answers(record, context, trained, where, inside, problems)
            if found == [] and record.get("is_impossible") is not True:
                meter.note(DROPPED, "held-out questions without an answer", where)
            elif found is not None:
                yield where, {"id": name, "question": question, "context": context, "answers": found}


def _answers(
    record: Content, context: str, trained: bool, where: str, place: str, problems: Problems
) -> list[Content] | None:
    """The answers of a question; None when something is wrong with them, which is then in `problems`."""
    impossible = record.get("is_impossible", False)
    if not isinstance(impossible, bool):
        problems.add(Problem(where, "", f"'is_impossible' must be true or false, it is {kind_of(impossible)}"))
        return None
    if "answers" not in record and (impossible or not trained):
        return []
    given = _part(record, "answers", list, place, problems)
    if given is None:
        return None
    if impossible and given:
        rule = f"'is_impossible' is true, but there is an answer ({len(given)} in 'answers')"
        problems.add(Problem(where, "", rule, '"answers": [] (SQuAD 2.0 has such answers in "plausible_answers")'))
        return None
    if not given and not impossible and trained:
        rule = "'answers' is empty, a question to train on has an answer or is marked as unanswerable"
        problems.add(Problem(where, "", rule, '"is_impossible": true'))
        return None
    found = []
    for number, answer in enumerate(given):
        inside = f"{place}.answers[{number}]"
        text = _text(answer, "text", inside, problems)
        start = _part(answer, "answer_start", int, inside, problems) if isinstance(answer, dict) else None
        if text is None or start is None:
            continue
        if wrong := misplaced(text, start, context, where):
            problems.add(wrong)
        else:
            found.append({"text": text, "start": start})
    return found if len(found) == len(given) else None


def misplaced(text: str, start: int, context: str, where: str) -> Problem | None:
    """What is wrong with the offset of an answer."""
    if start >= 0 and context.startswith(text, start):
        return None
    stands = f"there stands {_shown(context[start : start + len(text)])}"
    if not 0 <= start < len(context):
        stands = f"the context has {len(context)} characters"
    places, at = [], context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    rule = f"the answer {_shown(text)} is not at character {start} of the context: {stands}"
    if not places:
        return Problem(where, "", f"{rule}; the context does not have it anywhere")
    return Problem(where, "", rule, f'"answer_start": {min(places, key=lambda place: abs(place - start))}')


def _is_blank(record: Any, name: str) -> bool:
    value = record.get(name, False) if isinstance(record, dict) else False
    return value is None or (isinstance(value, str) and not value.strip())


def _text(record: Any, name: str, place: str, problems: Problems) -> str | None:
    """A text that is not blank; None (and a problem) otherwise."""
    value = _part(record, name, str, place, problems)
    if value is None:
        return None
    wrong = wrong_text(value) or ("" if value.strip() else "is empty")
    if wrong:
        problems.add(Problem(place, "", f"'{name}' {wrong}"))
    return None if wrong else value


def _part(record: Any, name: str, kind: type, place: str, problems: Problems) -> Any:
    """A member of an object, of this type; None (and a problem with the place in the document) otherwise."""
    if not isinstance(record, dict):
        problems.add(Problem(place, "", f"must be an object with '{name}', it is {kind_of(record)}"))
        return None
    if name not in record:
        near = did_you_mean(name, record)
        rule = f"no '{name}'; it has: {', '.join(record) or 'nothing'}"
        problems.add(Problem(place, "", rule, f"did you mean '{near}'?" if near else ""))
        return None
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        problems.add(Problem(place, "", f"'{name}' must be {KINDS[kind]}, it is {kind_of(value)}"))
        return None
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
