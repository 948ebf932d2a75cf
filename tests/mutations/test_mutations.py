"""Every deliberate break can still be applied, and the tests that must notice it are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mutations.run import ROOT, Mutation, mutations

ALL = mutations()


def test_there_are_enough() -> None:
    assert len(ALL) >= 40


@pytest.mark.parametrize("mutation", ALL, ids=lambda one: one.name)
def test_it_can_be_applied(mutation: Mutation) -> None:
    assert not mutation.problem(ROOT)
    assert mutation.before != mutation.after
    assert mutation.suffers and "\n" not in mutation.suffers
    whole = (ROOT / mutation.file).read_text(encoding="utf-8")
    if mutation.file.endswith(".py"):  # a break, not a typing error, which any test would notice
        ast.parse(whole.replace(mutation.before, mutation.after))


@pytest.mark.parametrize("mutation", ALL, ids=lambda one: one.name)
def test_its_tests_exist(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions, test
    assert not any(Path(test).is_absolute() for test in mutation.tests)
