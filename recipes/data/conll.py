"""CoNLL files: one token per line with its tag in another column, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from conf.errors import Problem, RequestError
from conf.schema import DataConfig
from recipes.data.changes import PASSED_OVER
from recipes.data.readers import _lines
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import FileSource, held_out_row
from recipes.data.streams import FileFormat

FIRST_TAGS = 100
"""Tags (without `O`) that decide whether there are entities or plain tags: one odd tag at the top decides nothing."""
Sentence = tuple[int, list[str], list[str]]
"""(number of its first line counted from 1, tokens, tags)."""

_ENTITY = re.compile(r"[BIESLU]-.+")


def is_entity_tag(tag: str) -> bool:
    """Whether a tag is `O`, or a prefix of BIO, BIOES or BILOU and a type (`B-person`)."""
    return tag == "O" or _ENTITY.fullmatch(tag) is not None


@dataclass(frozen=True)
class Columns:
    """Which columns hold the token and the tag: counted from 0, or from the end (-1 is the last one)."""

    tokens: int
    label: int

    @property
    def needed(self) -> int:
        """Columns that a line has at least: both exist, and the one counted from the end stays behind the other."""
        low, high = sorted((self.tokens, self.label))
        if low >= 0:
            return high + 1
        return -low if high < 0 else high + 1 - low


@dataclass(frozen=True)
class _Shape:
    """What the first line with a token tells about its file. width: its columns; 0: there is no such line."""

    tabs: bool
    width: int

    @property
    def is_universal(self) -> bool:
        """Whether a line has as many columns as CoNLL-U's."""
        return self.tabs and self.width == 10

    def split(self, line: str) -> list[str]:
        # Nothing but spaces and tabs separates: tokens of real text hold no-break spaces and the like.
        line = line.rstrip(" \t\r\n")
        return line.split("\t") if self.tabs else [part for part in line.replace("\t", " ").split(" ") if part]


class ConllSource(FileSource):
    """Sentences of CoNLL files, content `{"tokens": [str], "tags": [str]}`; the held-out split is by sentence.

    `data.tokens` (default 0) and `data.label` (default -1) are the numbers of the columns. A file is tab-separated when
    its first line with a token has a tab, and separated by spaces when not. `-DOCSTART-` lines are passed over.

    Tags are `O` or PREFIX-TYPE (BIO, BIOES, BILOU; an I- without a B- before it is legal, as in IOB1) when any of the
    first FIRST_TAGS tags is, and plain tags, any of them allowed, when none is.
    """

    config: DataConfig

    def check(self) -> list[Problem]:
        return self._column_problems() + super().check()

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        if wrong := self._column_problems():
            raise RequestError(wrong)
        splits = [(False, self.files(False)), (True, self.files(True))]
        by_row = not splits[1][1]
        entities = self._holds_entities([path for _, path in splits[0][1]])
        index = 0
        for split, files in splits:
            for _, path in files:
                start = meter.done
                for line, tokens, tags in read_conll(path, self.form, self.columns, entities, problems, meter):
                    held_out = held_out_row(index, self.held_out) if by_row else split
                    yield Row(f"{path}:{line}", held_out, {"tokens": tokens, "tags": tags})
                    index += 1
                meter.done = start + path.stat().st_size

    @property
    def columns(self) -> Columns:
        """Raises ValueError for what is no number; `check` has said so before."""
        return Columns(*(int(value) for _, value in self._column_keys()))

    def _column_keys(self) -> tuple[tuple[str, str], tuple[str, str]]:
        tokens, label = self.config.tokens, self.config.label
        return ("tokens", "0" if tokens is None else tokens), ("label", "-1" if label is None else label)

    def _column_problems(self) -> list[Problem]:
        rule = "a conll column is a number: 0 is the first one, -1 the last one"
        (tokens, first), (label, last) = self._column_keys()
        problems = [
            Problem(f"{self.key}.{name}", value, rule, f"{self.key}.{name}={default}")
            for name, value, default in ((tokens, first, "0"), (label, last, "-1"))
            if not re.fullmatch(r"-?[0-9]{1,4}", value)
        ]
        if not problems and int(first) == int(last):
            rule = f"tags are in another column than tokens ({self.key}.tokens={first})"
            problems.append(Problem(f"{self.key}.label", last, rule, f"{self.key}.label=-1"))
        return problems

    def _check_content(self, key: str, value: str, paths: list[Path], problems: Problems) -> None:
        if self._column_problems():
            return
        for path in paths:
            for _, tokens, _ in read_conll(path, self.form, self.columns, False, problems, Meter()):
                if _shape(path, self.form).is_universal and tokens == [
                    str(number + 1) for number in range(len(tokens))
                ]:
                    rule = f"{path} is CoNLL-U, whose first column numbers the words"
                    nearest = f"{self.key}.tokens=1 {self.key}.label=3"
                    problems.add(Problem(f"{self.key}.tokens", self._column_keys()[0][1], rule, nearest))
                return
            if problems.found:
                return
        problems.add(Problem(key, value, "there are no sentences in it", "a file with at least two sentences"))

    def _holds_entities(self, paths: list[Path]) -> bool:
        """Whether any of the first tags has a prefix; reads no further than they go."""
        unheard = Problems()  # the same lines are read again, and then reported
        sentences = (
            row for path in paths for row in read_conll(path, self.form, self.columns, False, unheard, Meter())
        )
        try:
            first = list(islice((tag for *_, tags in sentences for tag in tags if tag != "O"), FIRST_TAGS))
        except RequestError:
            return False
        return any(is_entity_tag(tag) for tag in first)


def read_conll(
    path: Path, form: FileFormat, columns: Columns, entities: bool, problems: Problems, meter: Meter
) -> Iterator[Sentence]:
    """The sentences of one file without a broken line; the broken lines go to `problems`.

    entities: tags other than those of `is_entity_tag` are broken.
    A line that starts with `# ` is a comment (counted in `meter`) when it has too few columns, or another number of
    columns than the first line with a token: `#` is a token of real text, too.
    """
    shape = _shape(path, form)
    first, broken = 0, False
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in _lines(path, form, problems, meter):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens and not broken:
                yield first, tokens, tags
            first, tokens, tags, broken = 0, [], [], False
            continue
        fields = shape.split(line)
        if line.startswith("# ") and (len(fields) < columns.needed or len(fields) != (shape.width or len(fields))):
            meter.note(PASSED_OVER, "comment lines", f"{path}:{number}")
            continue
        if shape.is_universal and re.fullmatch(r"\d+[-.]\d+", fields[0]):  # "del", whose "de" and "el" follow
            meter.note(PASSED_OVER, "words that stand for others, or for none (CoNLL-U)", f"{path}:{number}")
            continue
        first = first or number
        if problem := _wrong_line(f"{path}:{number}", fields, columns, shape, entities):
            problems.add(problem)
            broken = True
            continue
        tokens.append(fields[columns.tokens])
        tags.append(fields[columns.label].strip())
    if tokens and not broken:
        yield first, tokens, tags


def _shape(path: Path, form: FileFormat) -> _Shape:
    """That of the first line with a token; lines that may be comments have no say."""
    for _, line in _lines(path, form, Problems(), Meter()):
        if line.strip() and not line.startswith(("-DOCSTART-", "# ")):
            tabs = "\t" in line.rstrip(" \t\r\n")
            return _Shape(tabs, len(_Shape(tabs, 0).split(line)))
    return _Shape(False, 0)


def _wrong_line(where: str, fields: list[str], columns: Columns, shape: _Shape, entities: bool) -> Problem | None:
    if len(fields) < columns.needed:
        unit = f"{'tab' if shape.tabs else 'space'}-separated column{'s' if len(fields) != 1 else ''}"
        asked = f"tokens={columns.tokens} and label={columns.label} need {columns.needed}"
        return Problem(
            where, "", f"{len(fields)} {unit}, {asked}", "a blank line between sentences, TOKEN TAG in others"
        )
    if len(fields) != shape.width:
        rule = f"{len(fields)} columns, the first line with a token has {shape.width}"
        return Problem(where, "", rule, "as many columns in each line, or tabs between them")
    for name, column in (("tokens", columns.tokens), ("label", columns.label)):
        if not fields[column] or (name == "label" and not fields[column].strip()):
            return Problem(where, "", f"column {column} ({name}) is empty")
    tag = fields[columns.label].strip()
    if entities and not is_entity_tag(tag):
        upper = tag[:1].upper() + tag[1:]
        nearest = "O" if tag in ("0", "o") else upper if is_entity_tag(upper) else f"B-{tag}"
        return Problem(where, "", f"the tag '{tag}' is neither O nor PREFIX-TYPE (B, I, E, S, L, U)", nearest)
    return None
