"""A row, the columns it is made of, and the collector of everything that is wrong with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from conf.errors import Problem, RequestError, did_you_mean
from conf.schema import SourceConfig
from recipes.data.changes import DROPPED, PASSED_OVER, Change
from recipes.data.messages import TOOLS, check_chat
from recipes.data.values import assigned, wrong_text

MAX_PROBLEMS = 20
"""Broken lines reported at once; a file in the wrong format would otherwise report each of its lines."""


@dataclass(frozen=True)
class Row:
    """One document.

    where: `FILE` or `FILE:LINE`, for messages.
    held_out: belongs to the held-out split.
    content: `{"text": str}`, `{"prompt": str, "completion": str}` or `{"messages": [{"role", "content"}, …]}` (as of
    `messages.check_chat`), there also with `tools`.
    """

    where: str
    held_out: bool
    content: dict[str, Any]


class Problems:
    """Collects broken rows and raises them together: at the end, or as soon as there are MAX_PROBLEMS."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, problem: Problem) -> None:
        """Keep one more; raises RequestError when the list is full."""
        self.found.append(problem)
        if len(self.found) >= MAX_PROBLEMS:
            raise RequestError(
                [*self.found, Problem("…", "", f"stopped after {MAX_PROBLEMS} problems; there may be more")]
            )

    def raise_any(self) -> None:
        """Raise RequestError when anything was collected."""
        if self.found:
            raise RequestError(self.found)


@dataclass
class Meter:
    """How far reading has come, in bytes (files) or rows (hub), and what was passed over on the way."""

    total: int = 0
    done: int = 0
    changes: dict[str, Change] = field(default_factory=dict)
    """What was left out, cut or changed, by reason, such as `empty rows`."""

    def note(self, effect: str, what: str, where: str, length: int = 0) -> None:
        """Count something that does not reach the model as it is, without being an error.

        effect: one of those of `changes.py`. where: the row. length: of one that is too long, in tokens.
        """
        change = self.changes.setdefault(what, Change(what, effect, where))
        change.count += 1
        if length:
            change.lengths[length] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Reason → how often."""
        return {what: change.count for what, change in self.changes.items()}

    @property
    def dropped(self) -> int:
        """Rows of which nothing is left."""
        return sum(change.count for change in self.changes.values() if change.effect == DROPPED)


def column_keys(source: SourceConfig) -> dict[str, str]:
    """The configuration key of each column this source reads: {"text": "text"}, {"prompt": …, "completion": …}, …

    Maps the name inside a row to the column in the data; `messages` wins over `prompt`/`completion` over `text`.
    """
    if source.messages is not None:
        return {"messages": source.messages}
    if source.prompt is not None or source.completion is not None:
        return {"prompt": source.prompt or "", "completion": source.completion or ""}
    return {"text": source.text}


@dataclass(frozen=True)
class Fields:
    """What a task reads of a record. columns: the name inside a row (and of the configuration key) → the column."""

    columns: dict[str, str]
    check: Callable[[dict[str, Any], str, dict[str, str]], list[Problem]] | None = None
    """(content, where, columns) → what is wrong with the values; None: text is text."""
    empty: Callable[[dict[str, Any]], bool] | None = None
    """Whether there is nothing to learn in a row; None: no text."""
    may_be_blank: tuple[str, ...] | None = ()
    """Names whose value may be null or blank; None: all, which the checks see."""
    also: tuple[str, ...] = ()
    """Columns that are taken along, under their own names, where a record has them."""
    refuse_empty: bool = False
    """Such rows are problems; else they are left out, and counted."""

    def blank(self, content: dict[str, Any]) -> list[str]:
        """The columns of a row that have no value and need one."""
        if self.may_be_blank is None:
            return []
        return [
            self.columns[name] for name, value in content.items()
            if name not in self.may_be_blank and (value is None or (isinstance(value, str) and not value.strip()))
        ]  # fmt: skip

    def leave_out(self, where: str, without: str | None, problems: Problems, meter: Meter) -> None:
        """An empty row. without: the column that is blank where others are not, so that what they say is lost."""
        if self.refuse_empty:
            rule = f"nothing to learn: column '{without}' is blank" if without else "nothing to learn: it is blank"
            problems.add(Problem(where, "", rule, "mend the row, or data.empty=skip leaves such rows out, counted"))
        else:
            what = f"rows without '{without}'" if without else "empty rows"
            meter.note(DROPPED if without else PASSED_OVER, what, where)

    def problems(self, content: dict[str, Any], where: str) -> list[Problem]:
        return (self.check or check_content)(content, where, self.columns)

    def is_empty(self, content: dict[str, Any]) -> bool:
        return (self.empty or is_empty)(content)


def text_fields(source: SourceConfig) -> Fields:
    """Those of a language model: text, prompt and completion, or messages (and the tools beside them)."""
    if source.messages is None:
        return Fields(column_keys(source), may_be_blank=None)
    return Fields(column_keys(source), partial(check_chat, nulls=fills_up(source)), may_be_blank=None, also=TOOLS)


def fills_up(source: SourceConfig) -> bool:
    """Whether records have nulls where others have something: those of tables (Arrow) have all the same members."""
    return source.kind in ("parquet", "hub")


def value_of(record: dict[str, Any], column: str) -> Any:
    """A column of a record; `translation.en` is a column, or the `en` of the object in `translation`. KeyError."""
    if column in record:
        return record[column]
    outer, _, inner = column.partition(".")
    value = record[outer]
    if not inner or not isinstance(value, dict):
        raise KeyError(column)
    return value_of(value, inner)


def missing_columns(fields: Fields, key: str, present: Iterable[str], where: str) -> list[Problem]:
    """One problem per column that the configuration names and the data does not have. `key`: `data` or one source's."""
    names = [str(name) for name in present]
    shown = ", ".join(name if name.strip() == name != "" else repr(name) for name in names) or "none"
    missing = {
        name: column
        for name, column in fields.columns.items()
        if column not in names and column.partition(".")[0] not in names
    }
    near = {name: _nearest(column, names) for name, column in missing.items()}
    others = [name for name in names if name not in (*fields.columns.values(), *near.values())] or names
    return [
        Problem(
            f"{key}.{name}",
            column,
            f"{where} has no such column; it has: {shown}",
            assigned(f"{key}.{name}", near[name] or others[0]) if names else "",
        )
        for name, column in missing.items()
    ]


def _nearest(column: str, names: list[str]) -> str:
    """The name that is meant by a column: the same but for case and spaces around it, or a similar one."""
    bare = {name.strip().casefold(): name for name in reversed(names)}
    wanted = column.strip().casefold()
    return bare.get(wanted) or bare.get(did_you_mean(wanted, bare), "")


def check_content(content: dict[str, Any], where: str, columns: dict[str, str]) -> list[Problem]:
    """What is wrong with the values of one row: text that is no string, chats that are no list of role and content.

    Chats are afterwards as templates expect them.
    """
    if "messages" in content:
        return check_chat(content, where, columns)
    return [
        Problem(where, "", f"column '{columns[name]}' {wrong}")
        for name, value in content.items()
        if (wrong := wrong_text(value))
    ]


def wrong_class(value: Any, where: str, column: str, wanted: str = "a name or a whole number") -> Problem | None:
    """What is wrong with the class of a row; None for a name or a number."""
    if isinstance(value, str | int) and not isinstance(value, bool) and not wrong_text(str(value)):
        return None
    if isinstance(value, float) and value.is_integer():  # 1.0: a column of whole numbers of which some were missing
        return None
    nearest = "data.multi_label=true" if isinstance(value, list) else ""
    return Problem(where, repr(value)[:60], f"column '{column}' must be {wanted}", nearest)


def is_empty(content: dict[str, Any]) -> bool:
    """Whether there is nothing to learn in this row: no text, an empty completion, or a chat without turns."""
    return not (content["messages"] if "messages" in content else content.get("text", content.get("completion")))
