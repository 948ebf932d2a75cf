"""The straight line, and what is a number in a file."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from conf.errors import Problem
from recipes.data.numbers import FLOAT32_MAX, LINE_ROWS, LineSource, read_number
from recipes.data.rows import Meter, Problems
from recipes.data.sources import held_out_row


def test_the_line_is_twice_x(config):
    source, problems, meter = LineSource(config(kind="line"), "data", 0.2, None), Problems(), Meter()
    assert source.check() == []
    rows = list(source.read(problems, meter))
    assert not problems.found and len(rows) == source.size() == meter.done == LINE_ROWS
    x = [row.content["features"][0] for row in rows]
    np.testing.assert_allclose(x, np.linspace(-1, 1, LINE_ROWS), atol=1e-15)
    assert [row.content["target"] for row in rows] == [2 * value for value in x]
    assert all(len(row.content["features"]) == 1 for row in rows)
    assert [row.held_out for row in rows] == [held_out_row(index, 0.2) for index in range(LINE_ROWS)]
    assert 20 < sum(row.held_out for row in rows) < 60
    assert [row.where for row in rows[:2]] == ["line:1", "line:2"]
    assert source.fingerprint() == LineSource(config(kind="line"), "data", 0.2, None).fingerprint()


@pytest.mark.parametrize(
    "value, number",
    [("3.5", 3.5), (3.5, 3.5), (3, 3.0), (" -1e-3 ", -1e-3), ("+7", 7.0), (Decimal("0.5"), 0.5), (FLOAT32_MAX,) * 2],
)
def test_numbers(value, number):
    found = read_number(value, "rows.csv:2", "price")
    assert found == number and type(found) is float


@pytest.mark.parametrize(
    "value, rule, nearest",
    [
        ("cheap", "a finite number, it is 'cheap'", ""),
        ("", "a finite number, it is ''", ""),
        (None, "a finite number, it is null", ""),
        (True, "a finite number, it is true", ""),
        ([1.0], "a finite number, it is [1.0]", ""),
        ("nan", "a finite number, it is 'nan'", ""),
        (float("nan"), "a finite number, it is nan", ""),
        ("1_000", "a finite number, it is '1_000'", ""),
        ("1,5", "a finite number, it is '1,5'", "1.5"),
        ("a,b", "a finite number, it is 'a,b'", ""),
        ("-inf", "a number of at most 3.4e38 (float32), it is '-inf'", ""),
        (float("inf"), "a number of at most 3.4e38 (float32), it is inf", ""),
        (1e39, "a number of at most 3.4e38 (float32), it is 1e+39", ""),
        (10**400, "a number of at most 3.4e38 (float32), it is an integer of 1329 bits", ""),
        ("x" * 99, "a finite number, it is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…", ""),
    ],
)
def test_what_is_no_number(value, rule, nearest):
    problem = read_number(value, "rows.csv:2", "price")
    assert problem == Problem("rows.csv:2", "", f"column 'price' must be {rule}", nearest)


def test_what_passes_is_finite_in_float32():
    assert np.float32(FLOAT32_MAX) == np.finfo(np.float32).max == FLOAT32_MAX
