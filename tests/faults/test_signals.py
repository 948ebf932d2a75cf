"""The table of signals, executed; `make test` takes every phase and every signal once, `make test-all` every cell."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from jobs import HANG, Fault, Outcome, run_job
from signal_table import (
    ALL,
    ANY_FAILURE,
    BEFORE,
    DIED,
    KILL,
    LAST,
    LAUNCHER,
    PHASES,
    SAVE,
    STEP,
    Cell,
    chain,
    covering,
    document,
)
from support.tiers import THOROUGH
from trials import check_through, rows, saved

from launch.runtime.interruption import STOPPING
from launch.runtime.kernels import MARK

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
thorough = pytest.mark.skipif(not THOROUGH, reason="make test-all")


def job(folder: Path, *faults: Fault, more: tuple[str, ...] = (), extensions: Path | None = None) -> Outcome:
    """One that keeps the best model: it is exported after each evaluation here, where another one stood."""
    return run_job(folder, *faults, more=("eval.metric=loss", *more), extensions=extensions)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals") / "unbroken"
    assert job(folder).code == 0, said(folder)
    return folder


def said(folder: Path) -> str:
    """What all ranks printed."""
    return "".join(file.read_text() for file in sorted(folder.glob("out_*.log")))


def execute(one: Cell, folder: Path, *more: Fault) -> Outcome:
    """A signal in a phase of the run in a folder: its exit code, and what is kept."""
    if one.phase.place == "restore" and not saved(folder):
        assert job(folder, Fault(0, signal.SIGTERM, "step", 2)).code == 75
    before = saved(folder)
    outcome = job(folder, Fault(one.who, one.signal, one.phase.place, one.phase.at), *more)
    why = f"{one}: {outcome}\n{said(folder)}"
    assert not outcome.orphans, why
    if one.code == ANY_FAILURE:
        assert outcome.code not in (0, 2, 75), why
    else:
        assert outcome.code == (-one.signal if one.code == DIED else one.code), why
    assert "Traceback" not in said(folder) or one.code == ANY_FAILURE, why
    kept, step = saved(folder), max((row["step"] for row in rows(folder)), default=0)
    through = (folder / "run/summary.json").exists()
    # A rank that was killed may have taken a regular checkpoint with it; one whose launcher is gone may have gone on.
    assert {BEFORE: kept == before, STEP: kept == step, LAST: before <= kept <= step, ALL: through}[one.kept], why
    assert one.code != DIED or kept == step, why
    return outcome


def test_one_run_through_every_phase(unbroken: Path) -> None:
    """Stopped again and again, it ends as if nothing had been."""
    folder = unbroken.parent / "covering"
    for one in covering():
        execute(one, folder)
    check_through(folder, unbroken)
    assert json.loads((folder / "run/summary.json").read_text())["sample"] is not None
    places = {one.phase for one in covering()}
    assert places == set(PHASES) and {one.signal for one in covering()} == {*STOPPING, SAVE, KILL}


@thorough
@pytest.mark.parametrize("who", (0, 1))
@pytest.mark.parametrize("number", (*STOPPING, KILL))
def test_all_phases(number: signal.Signals, who: int, unbroken: Path) -> None:
    folder = unbroken.parent / f"{number.name}_{who}"
    for one in chain(number, who):
        execute(one, folder)
    assert job(folder).code == 0, said(folder)
    check_through(folder, unbroken)


ALONE = [
    *(one for who in (0, 1) for one in chain(SAVE, who)),
    *(one for number in (*STOPPING, KILL, SAVE) for one in chain(number, LAUNCHER)),
]
"""What does not stop a run at once: a request, and the launcher's end."""


@thorough
@pytest.mark.parametrize("one", ALONE, ids=str)
def test_one_phase(one: Cell, unbroken: Path) -> None:
    """In a run of its own."""
    folder = unbroken.parent / f"{one.signal.name}_{one.phase.place}_{one.who}"
    execute(one, folder)
    assert one.code != DIED or job(folder).code == 0, said(folder)
    check_through(folder, unbroken)
    shutil.rmtree(folder)


def test_a_rank_that_hangs_before_the_others_are_met(unbroken: Path) -> None:
    """The watchdog looks on from the preparation of the data; so does who ends ranks without a launcher."""
    folder = unbroken.parent / "left"
    assert not job(folder, Fault(1, HANG, "start"), Fault(LAUNCHER, KILL, "join")).orphans
    for phase in ("start", "join") if THOROUGH else ("start",):
        folder = unbroken.parent / f"hang_{phase}"
        outcome = job(folder, Fault(1, HANG, phase), more=("faults.stall_s=3",))
        assert outcome.code == 1 and not outcome.orphans and outcome.seconds < 40
        text = said(folder)
        assert "nothing has happened for 3 s (faults.stall_s), in the meeting of the ranks" in text, text
        assert "rank 1 does not go on" in text and "_act" in text, text
        assert "rank 0: waits in init_distributed" in text, text


def test_a_sample_that_takes_too_long(unbroken: Path) -> None:
    """All is written but the sample: a run that is asked to stop there has come to its end."""
    folder = unbroken.parent / "sample"
    faults = Fault(0, HANG, "generation"), Fault(0, signal.SIGTERM, "generation", after_s=0.1)
    outcome = job(folder, *faults, more=("checkpoint.grace_s=1", "checkpoint.every=0", "checkpoint.keep=2"))
    assert outcome.code == 0 and not outcome.orphans, said(folder)
    assert json.loads((folder / "run/summary.json").read_text())["sample"] is None


def compilers(folder: Path) -> list[str]:
    """Processes that compile for jobs in a folder, by the variable that they inherit."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            surroundings = process.environ()
            if MARK in surroundings and surroundings.get("TORCH_EXTENSIONS_DIR") == str(folder):
                found.append(" ".join(process.cmdline())[:80])
    return found


@pytest.mark.parametrize("number", (signal.SIGKILL, *((signal.SIGTERM, signal.SIGINT) if THOROUGH else ())))
def test_a_first_compilation(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off in its midst: no compiler works on."""
    extensions = tmp_path / "extensions"
    more = ("zero.stage=2", "zero.offload_optimizer=cpu")
    fault = Fault(0, number, "compiler", after_s=1.5)
    outcome = job(tmp_path / "job", fault, more=more, extensions=extensions)
    assert outcome.code == (247 if number == KILL else 75) and not outcome.orphans, said(tmp_path / "job")
    end = time.monotonic() + 5
    while (left := compilers(extensions)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    assert list(extensions.glob("**/build.ninja")), "nothing was being compiled"


def test_the_document_is_the_table() -> None:
    assert (ROOT / "docs/signals.md").read_text() == document(), "python tests/faults/signal_table.py > docs/signals.md"
