"""Statements of the standard library and the lexical classes of their tokens."""

from __future__ import annotations

import keyword
import sys
import tokenize
from pathlib import Path

import pytest

from recipes.data import lexical, sources
from recipes.data.lexical import LONGEST, TAGS, LexicalSource, statements
from recipes.data.rows import Meter, Problems


def read(data):
    """(rows, what was skipped)."""
    problems, meter = Problems(), Meter()
    rows = list(LexicalSource(data, "data", data.held_out, data.max_files).read(problems, meter))
    problems.raise_any()
    return rows, meter.counts


def tagged(text: str) -> list[list[tuple[str, str]]]:
    return [list(zip(tokens, tags, strict=True)) for _, tokens, tags in statements(text)]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """library({name: bytes}) makes these files the standard library."""

    def library(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
        return tmp_path

    return library


def test_each_class():
    (statement,) = tagged("if match is not None: x += -1.5e3 * f('a', b\"c\")  # why\n")
    assert statement == [
        ("if", "KEYWORD"), ("match", "NAME"), ("is", "KEYWORD"), ("not", "KEYWORD"), ("None", "KEYWORD"),
        (":", "OPERATOR"), ("x", "NAME"), ("+=", "OPERATOR"), ("-", "OPERATOR"), ("1.5e3", "NUMBER"),
        ("*", "OPERATOR"), ("f", "NAME"), ("(", "OPERATOR"), ("'a'", "STRING"), (",", "OPERATOR"),
        ('b"c"', "STRING"), (")", "OPERATOR"), ("# why", "COMMENT"),
    ]  # fmt: skip


def test_statements_span_lines_and_blocks():
    text = "# alone\n\ndef f(\n    a,  # first\n\n    b=[1,\n2],\n):\n    '''doc\n    string'''\n    return a; b\n"
    found = list(statements(text))
    assert [line for line, *_ in found] == [1, 3, 9, 11]
    assert found[1][1] == ["def", "f", "(", "a", ",", "# first", "b", "=", "[", "1", ",", "2", "]", ",", ")", ":"]
    assert found[2][1:] == (["'''doc\n    string'''"], ["STRING"])
    assert found[3][1] == ["return", "a", ";", "b"]
    assert tagged("x = 1") == [[("x", "NAME"), ("=", "OPERATOR"), ("1", "NUMBER")]]
    assert tagged("") == tagged("\n\n") == []


def test_long_tokens_are_cut():
    ((_, tokens, tags),) = statements(f"x = '{'a' * 100}'  # {'b' * 100}\n")
    assert [len(token) for token in tokens] == [1, 1, LONGEST, LONGEST] and tags[2:] == ["STRING", "COMMENT"]


def test_strings_with_braces():
    """One token before Python 3.12, pieces since."""
    statement = tagged("x = f'a {name} {1}' + y\n")[0]
    if sys.version_info < (3, 12):
        assert statement[2] == ("f'a {name} {1}'", "STRING") and len(statement) == 5
    else:
        assert statement[2:] == [
            ("f'", "STRING"), ("a ", "STRING"), ("{", "OPERATOR"), ("name", "NAME"), ("}", "OPERATOR"),
            ("{", "OPERATOR"), ("1", "NUMBER"), ("}", "OPERATOR"), ("'", "STRING"), ("+", "OPERATOR"), ("y", "NAME"),
        ]  # fmt: skip


def test_pieces_of_strings_by_name(monkeypatch):
    """The names of Python 3.12 and 3.14, on any version."""
    names = {900: "FSTRING_START", 901: "FSTRING_MIDDLE", 902: "TSTRING_END", 903: "NEW"}
    monkeypatch.setattr(tokenize, "tok_name", names)
    classes = [lexical.lexical_class(tokenize.TokenInfo(kind, "f'", (1, 0), (1, 2), "")) for kind in names]
    assert classes == ["STRING", "STRING", "STRING", None]
    assert lexical.lexical_class(tokenize.TokenInfo(901, " \n", (1, 0), (1, 2), "")) is None


def test_standard_library_is_split_by_file(config):
    rows, skipped = read(config(max_files=12))
    split = {path: held_out for row in rows for path, held_out in [(row.where.rpartition(":")[0], row.held_out)]}
    assert {row.where.rpartition(":")[0] for row in rows if row.held_out}.isdisjoint(
        row.where.rpartition(":")[0] for row in rows if not row.held_out
    )
    assert set(split.values()) == {True, False} and len(rows) > 500
    assert skipped["lines with fewer than 3 tokens"] > 10
    for row in rows:
        tokens, tags = row.content["tokens"], row.content["tags"]
        assert len(tokens) == len(tags) >= 3 and set(tags) <= set(TAGS)
        assert all(keyword.iskeyword(token) == (tag == "KEYWORD") for token, tag in zip(tokens, tags, strict=True))
    where, _, number = rows[0].where.rpartition(":")
    assert rows[0].content["tokens"][0] in Path(where).read_text("utf-8").splitlines()[int(number) - 1]


def test_what_is_passed_over_is_counted(library, config):
    root = library(
        {
            "a.py": b"x = 1\npass\n# one\ny = 2\n",
            "b.py": b"x = (1\n",
            "c.py": b"# coding: utf-8\nx = '\xff'\n",
            "d.py": b"",
            "e.py": b"if x:\n        y = 1\n    z = 2\n",
            "f.py": b"x = 'open\ny = 1\n",
            "g.py": b"z = 3\n",
        }
    )
    rows, skipped = read(config())
    assert sorted(row.where for row in rows) == [f"{root / 'a.py'}:1", f"{root / 'a.py'}:4", f"{root / 'g.py'}:1"]
    assert skipped == {
        "lines with fewer than 3 tokens": 2,
        "files that do not tokenise": 3,
        "files that do not decode": 1,
        "empty files": 1,
    }


def test_too_small_a_library(library, config):
    library({"a.py": b"x = 1\n"})
    data = config()
    (problem,) = LexicalSource(data, "data", data.held_out, None).check()
    assert "at least two are needed" in str(problem)
