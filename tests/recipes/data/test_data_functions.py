"""Rows made of the standard library's functions: defaults of parameters, docstrings, packages."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from conf.errors import RequestError
from recipes.data.docstrings import SOURCE, DocstringsSource
from recipes.data.functions import body, clip, functions, without_imports
from recipes.data.packages import PACKAGES, TEXT, PackagesSource
from recipes.data.parameters import CONTEXT, QUESTIONS, ParametersSource
from recipes.data.rows import Meter, Problems
from recipes.data.sources import Source

CODE = '''\
import os


class Box:
    @property
    def size(self):
        """The size.

        More.
        """
        # why
        import os.path as p, sys

        return self._size

    \f
    def pick(self, é="ä", /, b=(1 + 2), *args, c,
  d=None, e=[1,
           2], **kw):
        text = """
left
"""
        def inner(x=1):
            return x
        return text


if os:
    async def run(a=1, b=-2, c="x y", d=lambda: 0): "one line"; return a
else:
    def only(): "nothing but this"

def late(): import a; from b import (
    c,
    d); return a
'''


@pytest.fixture
def found(write):
    """The functions of CODE by name."""
    path = write("package/code.py", CODE)
    return {function.node.name: function for function in functions("package/code.py", path, Meter())}


def read(kind: type[Source], config, max_files: int | None = 24, held_out: float = 0.2):
    """(training rows, held-out rows)."""
    problems = Problems()
    meter = Meter()
    source = kind(config(kind="stdlib"), "data", held_out, max_files)
    assert source.check() == []
    rows = list(source.read(problems, meter))
    problems.raise_any()
    assert meter.done == source.size() and set(meter.counts) <= {"functions like an earlier one"}
    return [row for row in rows if not row.held_out], [row for row in rows if row.held_out]


def file_of(row) -> str:
    return row.where.rpartition(":")[0]


def contents(kind: type, function, config) -> list[dict]:
    return list(kind(config(kind="stdlib"), "data", 0.2, None).contents(function))


# Functions


def test_functions_and_methods_are_found_in_order(found):
    assert list(found) == ["size", "pick", "run", "only", "late"]
    assert all(
        CODE.split("\n")[function.line - 1].lstrip().split("(")[0].endswith(name) for name, function in found.items()
    )
    assert found["size"].source.startswith('def size(self):\n    """The size.\n')
    assert found["pick"].source.endswith(
        '    text = """\nleft\n"""\n    def inner(x=1):\n        return x\n    return text'
    )
    assert found["run"].source.startswith("async def run(")


def test_files_that_do_not_parse_are_counted(tmp_path):
    meter = Meter()
    for name, data in (
        ("syntax", b"def f(:\n"),
        ("null", b"a = 1\0\n"),
        ("deep", b"(" * 5000),
        ("codec", b"# -*- coding: no-such-codec -*-\n"),
    ):
        path = tmp_path / f"{name}.py"
        path.write_bytes(data)
        assert list(functions(path.name, path, meter)) == []
    assert meter.counts == {"files that do not parse": 3, "files that do not decode": 1}


def test_clip_keeps_whole_lines():
    assert [clip("ab\ncd\nef", limit) for limit in (8, 7, 5, 4, 2, 1)] == [
        "ab\ncd\nef",
        "ab\ncd",
        "ab\ncd",
        "ab",
        "ab",
        "a",
    ]


def test_only_files_without_rows(config):
    with pytest.raises(RequestError, match=r"data.max_files=2: fewer than two of these files .*give a row"):
        source = type("Nothing", (ParametersSource,), {"contents": lambda self, function: iter(())})
        read(source, config, max_files=2)


def test_each_task_has_a_fingerprint_of_its_own(config):
    kinds = (ParametersSource, DocstringsSource, PackagesSource)
    prints = [kind(config(kind="stdlib"), "data", 0.2, 8).fingerprint() for kind in kinds]
    assert len(set(prints)) == 3
    assert prints == [kind(config(kind="stdlib"), "data", 0.2, 8).fingerprint() for kind in kinds]


@pytest.mark.parametrize("kind", [ParametersSource, DocstringsSource])
@pytest.mark.parametrize("max_files", [12, 20])
def test_files_are_in_one_split(kind, max_files, config):
    for share in (0.001, 0.3, 0.999):
        train, held_out = read(kind, config, max_files, share)
        assert train and held_out
        assert not {file_of(row) for row in train} & {file_of(row) for row in held_out}
        assert read(kind, config, max_files, share) == (train, held_out)


# Defaults of parameters


def test_answers_are_the_sources_of_the_defaults(found, config):
    rows = contents(ParametersSource, found["pick"], config)
    assert [(row["question"], row["answers"][0]["text"]) for row in rows] == [
        ("default of parameter é of function pick?", '"ä"'),
        ("default of parameter b of function pick?", "1 + 2"),
        ("default of parameter d of function pick?", "None"),
    ]  # that of e has two lines
    assert [row["id"] for row in rows] == [f"package/code.py:{found['pick'].line}:{name}" for name in "ébd"]
    rows = contents(ParametersSource, found["run"], config)
    assert [row["answers"][0]["text"] for row in rows] == ["1", "-2", '"x y"'] and len(rows) == QUESTIONS
    for row in rows:
        (answer,) = row["answers"]
        assert row["context"][answer["start"] :].startswith(answer["text"])
    assert contents(ParametersSource, found["size"], config) == []


def test_real_answers_stand_at_their_offsets(config):
    train, held_out = read(ParametersSource, config, max_files=24)
    rows = train + held_out
    assert len(rows) > 50 and len({row.content["id"] for row in rows}) == len(rows)
    trees: dict[str, dict[int, ast.AST]] = {}
    for row in rows:
        content, path = row.content, Path(file_of(row))
        assert set(content) == {"id", "question", "context", "answers"} and len(content["context"]) <= CONTEXT
        ((text, start),) = [(answer["text"], answer["start"]) for answer in content["answers"]]
        assert content["context"][start : start + len(text)] == text
        if file_of(row) not in trees:
            nodes = ast.walk(ast.parse(path.read_bytes()))
            definitions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            trees[file_of(row)] = {node.lineno: node for node in definitions}
        name, line, parameter = content["id"].rsplit(":", 2)
        assert path.as_posix().endswith(name) and row.where == f"{path}:{line}"
        arguments = trees[file_of(row)][int(line)].args
        named = [*arguments.posonlyargs, *arguments.args]
        pairs = dict(zip([a.arg for a in named][::-1], arguments.defaults[::-1], strict=False))
        pairs |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
        assert ast.dump(ast.parse(text, mode="eval").body) == ast.dump(pairs[parameter])


# Docstrings


def test_a_body_and_its_docstring(found, config):
    (row,) = contents(DocstringsSource, found["size"], config)
    assert row == {"source": "# why\nimport os.path as p, sys\n\nreturn self._size", "target": "The size."}
    assert body(found["only"]) == ""
    assert [contents(DocstringsSource, found[name], config) for name in ("only", "pick", "run")] == [[], [], []]


def test_an_empty_first_line_is_left_out(write, config):
    path = write("f.py", 'def f():\n    """\n    Late.\n    """\n    return 1\n')
    (function,) = functions("f.py", path, Meter())
    assert contents(DocstringsSource, function, config) == []


def test_real_docstrings(config):
    train, held_out = read(DocstringsSource, config, max_files=24)
    for row in train + held_out:
        source, target = row.content["source"], row.content["target"]
        assert source.strip() and len(source) <= SOURCE and target == target.strip() != "" and "\n" not in target
        assert f'"""{target}' not in source
        if len(source) < SOURCE // 2:
            ast.parse("async def f():\n" + "".join(f" {line}\n" for line in source.split("\n")))


# Packages


def test_imports_are_left_out(found):
    assert "import" not in without_imports(found["size"]) and "# why\n\n    return" in without_imports(found["size"])
    assert without_imports(found["late"]) == "def late(): ; ; return a"
    assert without_imports(found["pick"]) == found["pick"].source


def test_import_on_the_last_line(write):
    path = write("f.py", "def f():\n    if 1:\n        import a  # b\n")
    (function,) = functions("f.py", path, Meter())
    assert without_imports(function) == "def f():\n    if 1:"


def test_packages(config):
    train, held_out = read(PackagesSource, config, max_files=32)
    assert {row.content["label"] for row in train} == set(PACKAGES)
    for row in train + held_out:
        assert row.content["label"] in Path(file_of(row)).parts
        text = row.content["text"]
        assert text.startswith(("def ", "async def ")) and len(text) <= TEXT
    assert len({row.content["text"] for row in train + held_out}) == len(train) + len(held_out)
    share = len(held_out) / (len(train) + len(held_out))
    assert 0.15 < share < 0.25
    assert read(PackagesSource, config, max_files=32) == (train, held_out)


def test_packages_exist_and_share_max_files(config):
    everything = PackagesSource(config(kind="stdlib"), "data", 0.2, None).files(False)
    assert {name.partition("/")[0] for name, _ in everything} == set(PACKAGES) <= set(sys.stdlib_module_names)
    some = PackagesSource(config(kind="stdlib"), "data", 0.2, 16).files(False)
    assert some == sorted(some) and len(some) == 16
    assert [name.partition("/")[0] for name, _ in some] == sorted(2 * PACKAGES)
