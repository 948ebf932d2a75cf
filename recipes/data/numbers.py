"""Rows of numbers: a straight line that needs no file, and reading one number of a CSV or JSONL row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from conf.errors import Problem
from recipes.data.rows import Meter, Problems, Row
from recipes.data.sources import Source, held_out_row

LINE_ROWS = 200
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
SHOWN = 40
"""Characters of a wrong value that a message repeats."""


class LineSource(Source):
    """y = 2x at 200 places x, evenly spaced over [-1, 1]: `{"features": [x], "target": 2x}`, without noise."""

    def check(self) -> list[Problem]:
        return []

    def fingerprint(self) -> str:
        return f"line of {LINE_ROWS}"

    def size(self) -> int:
        return LINE_ROWS

    def read(self, problems: Problems, meter: Meter) -> Iterator[Row]:
        for index in range(LINE_ROWS):
            meter.done += 1
            x = 2 * index / (LINE_ROWS - 1) - 1
            content = {"features": [x], "target": 2 * x}
            yield Row(f"line:{index + 1}", held_out_row(index, self.held_out), content)


def read_number(value: Any, where: str, column: str) -> float | Problem:
    """A number, or its text ("3.5", "1e-3"), as a float; what is wrong with it when it is none.

    Refused: null, booleans, other text (Python's own 1_000 too), nan, infinities, and what float32 cannot hold.
    """
    number = math.nan
    try:
        if isinstance(value, str):
            number = math.nan if "_" in value else float(value)
        elif isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            number = float(value)
    except ValueError:
        pass
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if math.isfinite(number) and abs(number) <= FLOAT32_MAX:
        return number
    return Problem(where, "", f"column '{column}' must be {_wanted(number)}, it is {_shown(value)}", _nearest(value))


def _wanted(number: float) -> str:
    return "a number of at most 3.4e38 (float32)" if abs(number) > FLOAT32_MAX else "a finite number"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print very long integers
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _nearest(value: Any) -> str:
    """A decimal comma written as a point, thousands without commas; empty when that is not the mistake."""
    if not isinstance(value, str) or not value.count(","):
        return ""
    if re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+(\.\d*)?\s*", value):
        return value.replace(",", "").strip()
    if value.count(",") > 1:
        return ""
    try:
        return f"{float(value.replace(',', '.')):g}"
    except ValueError:
        return ""
