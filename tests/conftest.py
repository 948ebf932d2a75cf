"""Shared settings of the suite: CPU, no hub, one thread per process, a cache of its own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # two workers side by side: benchmarks/README.md, "Threads that spin"
# Where torch keeps what it compiles: one folder for the suite, which stays, or each private cache would compile again.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{tempfile.gettempdir()}/torch_extensions_of_tests_{os.getuid()}")

from support import pace, warm

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup runs would rightly not hear it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pace", action="store_true", help="say what took how long, and how it compares to the budget")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--pace"):
        config.pluginmanager.register(pace.Pace(pace.calibration()))
    folder = pace.run_folder()
    folder.__enter__()
    config.add_cleanup(lambda: folder.__exit__(None, None, None))
    if config.getoption("numprocesses", None):
        for server in (warm.FULL, warm.LIGHT):
            server.begin()  # one for all workers; it imports while they collect


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories and data paths are relative: no test must meet the runs of whoever works in the checkout."""
    monkeypatch.chdir(tmp_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    pace.long_first(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with pace.turn(item.get_closest_marker("alone") is not None):
        return (yield)
