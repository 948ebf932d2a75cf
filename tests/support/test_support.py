"""The machinery of the suite itself, where a mistake would hide others: what is skipped, who runs beside whom, sums."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import everything
import pytest
from everything import Part

from support import pace
from support.suite_profile import shares

ROOT = Path(__file__).resolve().parents[2]


def test_parts_of_everything_are_commands_that_exist() -> None:
    parts = everything.parts()
    assert len({part.name for part in parts}) == len(parts) > 15
    for part in parts:
        for word in part.command.split()[1:]:
            assert not word.endswith(".py") or (ROOT / word).is_file(), part
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("**/test_*.py"))}
    words = [word for part in parts for word in part.command.split()]
    assert "tests" in words, "whatever no other part has"
    left_out = {word.removeprefix("--ignore=tests/") for word in words if word.startswith("--ignore=")}
    assert left_out <= folders and all(f"tests/{folder}" in words for folder in left_out)


def test_the_worst_of_the_matrix_is_read_from_its_table() -> None:
    said = everything.worst_of_matrix((ROOT / "docs" / "matrix.md").read_text())
    assert said.startswith("1856 cases; largest relative errors: loss 2") and "nan" not in said


def test_what_has_passed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "count.py").write_text(
        "import sys; open(sys.argv[1], 'a').write('x'); print('3 passed'); sys.exit(len(sys.argv) > 2)"
    )
    command = f"{{python}} {tmp_path}/count.py {tmp_path}/"
    parts = (Part("good", f"{command}good", everything.counted), Part("bad", f"{command}bad 1", everything.counted))
    for name, value in (("parts", lambda: parts), ("state_folder", lambda: tmp_path), ("PAGE", tmp_path / "proof.md")):
        monkeypatch.setattr(everything, name, value)
    assert everything.main([]) == everything.main([]) == 1
    assert [(tmp_path / name).read_text() for name in ("good", "bad")] == ["x", "xx"]
    page = (tmp_path / "proof.md").read_text()
    assert "| good | passed | 3 passed |" in page and "| bad | FAILED (1) |" in page


def test_who_is_alone_is_alone() -> None:
    """Others that have begun are waited for, and none begins beside it."""
    inside: set[str] = set()
    seen: list[set[str]] = []

    def test(name: str, alone: bool) -> None:
        with pace.turn(alone):
            inside.add(name)
            seen.append(set(inside))
            time.sleep(0.1)
            inside.discard(name)

    # flock is by open file, so threads wait for each other as workers do. This test itself is in a shared turn.
    names = [("one", False), ("two", False)]
    threads = [threading.Thread(target=test, args=entry) for entry in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"one", "two"} in seen


def test_time_is_shared_out_among_those_at_work() -> None:
    """A test of 10 s: 4 s two processes import, then one trains for 3 s beside one that waits, then nobody works."""
    found = shares(
        [(0.0, 10.0, "tests/a.py::test")],
        [(0.0, 4.0, "imports"), (0.0, 4.0, "training"), (4.0, 7.0, "training"), (4.0, 7.0, "other")],
    )
    assert found == {"tests/a.py": {"imports": 2.0, "training": 5.0, "other": 3.0}}


def test_the_calibration_is_a_time() -> None:
    assert 0.05 < pace.calibration() < 60
