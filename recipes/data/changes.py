"""What became of the rows that were not learned as they are: counted by reason, said before the start, refused above
`data.max_dropped`.

Counts are kept in the cache beside the rows, so that a second start says what the first one did. Where a row stands is
kept as the number of its file: the same files in another folder are the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.errors import Problem

DROPPED = "dropped"
"""What the row teaches is lost."""
CUT = "cut"
CHANGED = "changed"
DOUBTFUL = "doubtful"
"""Learned as it is, which may not be what is meant."""
PASSED_OVER = "passed over"
"""Nothing is lost: there was nothing in it, or it is no row."""
MULTIPLE = 8
"""Lengths that are advised are multiples of this, as those of unpacked sequences are."""
Place = list[Any]
"""[number of the origin (a file) in the order of its source, what follows its name]; [-1, all of it] elsewhere."""


@dataclass
class Change:
    """One reason. effect: one of the words above. first: where the first such row stands. lengths: of rows that are too
    long, in tokens → how many of them."""

    what: str
    effect: str
    first: str
    count: int = 0
    lengths: Counter[int] = field(default_factory=Counter)


def recorded(changes: Iterable[Change], origins: Sequence[str], rows: int) -> list[dict[str, Any]]:
    """JSON values for the cache. origins: as of `Source.origins`. rows: of all splits, before any was left out."""
    return [
        {
            "what": change.what, "effect": change.effect, "count": change.count, "of": rows,
            "first": place_of(change.first, origins), "seq_length": enough(change.lengths, rows // 20),
        }
        for change in changes
    ]  # fmt: skip


def place_of(where: str, origins: Sequence[str]) -> Place:
    """Which of the origins `where` (`FILE`, `FILE:LINE`, …) begins with."""
    for number, origin in enumerate(origins):
        if where.startswith(origin) and where[len(origin) :][:1] in ("", ":"):
            return [number, where[len(origin) :]]
    return [-1, where]


def where(place: Place, origins: Sequence[str]) -> str:
    """The opposite of `place_of`, with the names that the origins have now."""
    number, rest = place
    return rest if number < 0 else f"{origins[number]}{rest}"


def enough(lengths: Mapping[int, int], spare: int) -> int | None:
    """The length with which all rows but `spare` are whole; None where no more are too long.

    lengths: of those that are too long, in tokens → how many.
    """
    for length in sorted(lengths, reverse=True):
        spare -= lengths[length]
        if spare < 0:
            return -(-length // MULTIPLE) * MULTIPLE
    return None


def reported(changes: Iterable[Mapping[str, Any]], source: str, origins: Sequence[str]) -> list[dict[str, Any]]:
    """Those of one source for summary.json: the places are names again."""
    return [{"source": source, **change, "first": where(change["first"], origins)} for change in changes]


def lines(changes: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each reason: effect, count, share, the length that would help, and the first row."""
    found = []
    for change in changes:
        of = f"{change['count'] / change['of']:.1%} of {change['of']:,} rows; " if change["of"] else ""
        of = "" if change["effect"] == PASSED_OVER else of
        longer = f"data.seq_length={change['seq_length']} keeps 95% whole; " if change["seq_length"] else ""
        found.append(f"{change['effect']}: {change['count']:,} {change['what']} ({of}{longer}first: {change['first']})")
    return found


def check_dropped(changes: Sequence[Mapping[str, Any]], key: str, rows: int, limit: float) -> list[Problem]:
    """More rows of one source are dropped than `data.max_dropped`. changes: as of `reported`. key: of the source."""
    dropped = [change for change in changes if change["effect"] == DROPPED]
    count = sum(change["count"] for change in dropped)
    if not rows or count / rows <= limit:
        return []
    share = f"{-(-count * 1000 // rows) / 1000:g}"
    ways = [f"data.max_dropped={share} to train without them"] if count < rows else []
    lengths = [change["seq_length"] for change in dropped if change["seq_length"]]
    others = sum(change["count"] for change in dropped if not change["seq_length"])
    if lengths and others / rows <= limit:
        ways.insert(0, f"data.seq_length={max(lengths)}, which keeps 95% of the rows whole")
    nearest = ", or ".join(ways) or "rows with something to learn"
    rule = f"{count:,} of {rows:,} rows are dropped, more than data.max_dropped={limit:g}"
    return [Problem(key, dropped[0]["source"], "\n      ".join([rule, *lines(dropped)]), nearest)]
