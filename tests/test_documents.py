"""The documents name what there is: links lead somewhere, every recipe, group and file of a run is in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import ROOT
from promises import PAGE, PROMISES, files

from conf.overrides import groups
from conf.rules_run import RUN_FILES, RUN_FOLDERS

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths into the rooms, in backquotes; what contributors are told to make (examples) is in fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:conf|recipes|launch|tests|notebooks|docs|benchmarks)/[\w./]*[\w/])`", text)
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_readme_has_every_recipe_and_choice() -> None:
    for group, choices in groups().items():
        assert f"`{group}`" in README or f"+{group}=" in README, group
        for choice in choices:
            assert f"`{choice}`" in README, f"{group}={choice}"


def test_the_readme_has_what_a_run_writes() -> None:
    for name in (*RUN_FILES, *(f"{folder}/" for folder in RUN_FOLDERS)):
        assert f"`{name}`" in README, name


def test_every_promise_has_its_tests_and_its_row() -> None:
    assert [file for file in files() if not (ROOT / file).is_file()] == []
    page = PAGE.read_text(encoding="utf-8")
    assert [promise for promise, *_ in PROMISES if f"| {promise} |" not in page] == []
