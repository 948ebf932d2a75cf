"""Tests of the configuration stand in an empty directory: run directories and data paths are relative to it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
