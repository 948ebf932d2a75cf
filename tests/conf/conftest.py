"""Tests of the configuration ask Hydra once for each request."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from conf import compose

_composed: dict[tuple[str, ...], Any] = {}
_compose = compose._compose


@pytest.fixture(autouse=True)
def each_request_once(monkeypatch):
    """Hydra takes a fifth of a second for a request, and many tests look at the same ones; no file of conf/ changes."""

    def remembered(read):
        key = (str(compose.CONF_DIR), *read.for_hydra(), *map(repr, read.changes))
        if key not in _composed:
            _composed[key] = _compose(read)
        return copy.deepcopy(_composed[key])

    monkeypatch.setattr(compose, "_compose", remembered)
    monkeypatch.setattr("conf_cases._compose", remembered)
