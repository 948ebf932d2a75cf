"""Every release resumes the checkpoints of all before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import TRAIN, environment, launcher, rows, run
from support.tiers import THOROUGH

from golden.make import HERE, RUNS, SAVED, lay_out

TOLERANCE = 2e-3
"""Of losses, relative: three steps on another processor, with other kernels of another torch, add in another order. A
state of the optimizer that is forgotten moves the third loss by 2%."""
CASES = [(version.name, name) for version in sorted(HERE.iterdir()) if (version / "classes").is_dir() for name in RUNS]


def resumed(version: str, name: str, folder: Path, ranks: int, *more: str) -> str:
    lay_out(folder)
    saved = folder / "run/checkpoints" / f"step_{SAVED:08d}"
    shutil.copytree(HERE / version / name / saved.name, saved)
    command = [*launcher("torchrun" if ranks > 1 else "python", ranks), TRAIN, *RUNS[name][1], "resume=auto", *more]
    done = run(command, folder, environment(folder / "xdg"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_checkpoint_of_a_release_is_resumed(version: str, name: str, tmp_path: Path) -> None:
    said = resumed(version, name, tmp_path, RUNS[name][0])
    assert f"resumes after step {SAVED}" in said
    expected = json.loads((HERE / version / name / "expected.json").read_text())
    training, evaluations = rows(tmp_path / "run")
    assert [row["step"] for row in training] == [row["step"] for row in expected["rows"]]
    for row, kept in zip(training, expected["rows"], strict=True):
        assert row["lr"] == pytest.approx(kept["lr"])
        assert row["loss"] == pytest.approx(kept["loss"], rel=TOLERANCE), said
        assert row["grad_norm"] == pytest.approx(kept["grad_norm"], rel=10 * TOLERANCE, abs=TOLERANCE), said
    assert evaluations[-1]["loss"] == pytest.approx(expected["held_out"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not THOROUGH, reason="make test-all")
@pytest.mark.parametrize(("version", "name"), CASES)
def test_and_by_another_number_of_ranks(version: str, name: str, tmp_path: Path) -> None:
    ranks = 3 - RUNS[name][0]
    resumed(version, name, tmp_path, ranks, "batch.accumulation=null")
    expected = json.loads((HERE / version / name / "expected.json").read_text())
    last = rows(tmp_path / "run")[1][-1]
    assert last["loss"] == pytest.approx(expected["held_out"], rel=TOLERANCE)


def test_they_are_small() -> None:
    assert CASES
    sizes = {
        path: path.stat().st_size for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert max(sizes.values()) < 60_000 and sum(sizes.values()) < 300_000 * len({version for version, _ in CASES})
