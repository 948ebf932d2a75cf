"""What a run survives: deaths at any moment, signals in each phase, hanging ranks, bad numbers, a vanishing folder.

A seeded part of the deaths, and some of the phases; `make test-faults` runs two hundred of all.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from jobs import HANG, NO_MEMORY, VANISH, Fault, run_job
from trials import Trials, check_through, rows, saved

pytestmark = pytest.mark.slow
TRIALS = 6


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), seed=0)


def said(folder: Path) -> str:
    """What all ranks printed."""
    return "".join(file.read_text() for file in sorted(folder.glob("out_*.log")))


def test_deaths_at_random(trials: Trials) -> None:
    for _ in range(TRIALS):
        trials.one()
    trials.close()
    print(trials.report())


def test_sigterm_while_a_checkpoint_is_published(trials: Trials) -> None:
    """The phases of docs/signals.md are in test_signals.py; this one is between two renames."""
    folder = trials.unbroken.parent / "sigterm_publish"
    assert run_job(folder, Fault(0, signal.SIGTERM, "publish")).code == 75, said(folder)
    assert "Traceback" not in said(folder)
    assert saved(folder) == max(row["step"] for row in rows(folder)), said(folder)
    assert run_job(folder).code == 0, said(folder)
    check_through(folder, trials.unbroken)


def test_a_terminal_that_goes_away(trials: Trials) -> None:
    """SIGHUP to one rank: as SIGTERM."""
    folder = trials.unbroken.parent / "hangup"
    code = run_job(folder, Fault(1, signal.SIGHUP, "step", 5)).code
    assert code == 75 and saved(folder) == max(row["step"] for row in rows(folder)), said(folder)
    assert run_job(folder).code == 0, said(folder)
    check_through(folder, trials.unbroken)


def test_a_second_run_is_refused_and_leaves_the_first_one_s_logs(trials: Trials) -> None:
    folder = trials.unbroken.parent / "second"
    assert run_job(folder, Fault(1, signal.SIGTERM, "step", 4)).code == 75, said(folder)
    logs = sorted((folder / "run/logs").glob("rank_*.log"))
    before = {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs}
    assert len(logs) == 2 and all(content for content, _ in before.values())
    with FileLock(folder / "run/.lock"):
        assert run_job(folder).code == 2, said(folder)
    assert "another run is at work in it" in said(folder)
    assert {log: (log.read_bytes(), log.stat().st_mtime_ns) for log in logs} == before
    assert sorted(entry.name for entry in (folder / "run/logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    assert run_job(folder).code == 0, said(folder)
    check_through(folder, trials.unbroken)
    assert all(log.stat().st_mtime_ns > before[log][1] for log in logs), "each start has logs of its own"
    assert sorted(entry.name for entry in (folder / "run/logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_a_checkpoint_on_request(trials: Trials) -> None:
    """SIGUSR1 to one rank: all save behind the step at hand, and the run goes on."""
    folder = trials.unbroken.parent / "asked"
    assert run_job(folder, Fault(1, signal.SIGUSR1, "step", 4), more=("checkpoint.every=100",)).code == 0, said(folder)
    steps = [int(entry.name[5:]) for entry in sorted((folder / "run/checkpoints").glob("step_*"))]
    assert steps in ([4, 12], [5, 12]), said(folder)
    check_through(folder, trials.unbroken)


def test_too_late_for_a_checkpoint(trials: Trials) -> None:
    """A step that does not end within checkpoint.grace_s: the last whole checkpoint stands."""
    folder = trials.unbroken.parent / "late"
    assert run_job(folder, Fault(0, signal.SIGTERM, "step", 8)).code == 75
    asked = [Fault(rank, signal.SIGTERM, after_s=2 * trials.span_s) for rank in (0, 1)]
    outcome = run_job(folder, Fault(1, HANG, "step", 2), *asked, more=("checkpoint.grace_s=2", "faults.stall_s=0"))
    assert outcome.code == 75 and not outcome.orphans
    assert "not stopped within 2 s" in said(folder) and saved(folder) == 8
    assert run_job(folder).code == 0, said(folder)
    check_through(folder, trials.unbroken)


@pytest.mark.parametrize(("kind", "expected"), [(HANG, "rank 1 does not go on"), (signal.SIGSTOP, "rank 1")])
def test_a_rank_that_hangs_is_named(kind: int, expected: str, trials: Trials) -> None:
    folder = trials.unbroken.parent / f"hang_{kind}"
    outcome = run_job(folder, Fault(1, kind, "step", 5), more=("faults.stall_s=4",))
    assert outcome.code not in (0, 75) and not outcome.orphans and outcome.seconds < 60
    text = said(folder)
    assert "nothing has happened for 4 s (faults.stall_s), in step 5" in text and expected in text, text
    assert "rank 0: waits in all_reduce" in text, text
    assert kind != HANG or "_act" in text  # the stack leads to the place
    assert run_job(folder).code == 0, said(folder)
    check_through(folder, trials.unbroken)


def test_bad_steps(trials: Trials) -> None:
    """Stop before the update; or no update; or back to the checkpoint, and on without those samples."""
    folder = trials.unbroken.parent / "bad_stop"
    assert run_job(folder, poisoned=4).code == 1
    assert "step 5, rank 0: loss is nan" in said(folder) and saved(folder) == 3
    for action, steps in (("skip", 12), ("rewind", 12)):
        folder = trials.unbroken.parent / f"bad_{action}"
        assert run_job(folder, more=(f"faults.on_bad_step={action}",), poisoned=4).code == 0, said(folder)
        training = [row for row in rows(folder) if row["split"] is None]
        assert [row["step"] for row in training] == list(range(1, steps + 1))
        lines = [json.loads(line) for line in (folder / "run/bad_steps.jsonl").read_text().splitlines()]
        assert [(line["samples"], line["action"]) for line in lines] == [([32, 40], action)]
        expected = [row for row in rows(trials.unbroken) if row["split"] is None]
        assert training[:4] == expected[:4]
        assert (training[4]["loss"] is None) == (action == "skip")
        assert all(row["loss"] is not None for row in training[5:])


def test_a_run_directory_that_vanishes(trials: Trials) -> None:
    """Training goes on, and the next checkpoint is there again."""
    folder = trials.unbroken.parent / "vanish"
    assert run_job(folder, Fault(0, VANISH, "step", 5)).code == 0, said(folder)
    assert "cannot be written for now" in said(folder) and saved(folder) == 12


MICRO = "batch.micro_size=1 batch.accumulation=4, the same global batch of 8"


@pytest.mark.parametrize(
    ("phase", "at", "where", "first"),
    [
        ("forward", 1, "the evaluation after step 0 (a forward pass without gradients)", "eval.micro_size=1"),
        ("backward", 5, "step 3 (the backward pass)", MICRO),  # two micro-batches a step
    ],
)
def test_a_device_without_memory(phase: str, at: int, where: str, first: str, trials: Trials) -> None:
    """On one rank: which phase, what was planned, which keys help; no traceback, and the other rank ends too."""
    folder = trials.unbroken.parent / f"no_memory_{phase}"
    outcome = run_job(folder, Fault(1, NO_MEMORY, phase, at), more=("train.fused_loss=false",))
    assert outcome.code == 1 and not outcome.orphans and outcome.seconds < 60
    text = (folder / "out_1.log").read_text()
    assert "Traceback" not in said(folder), said(folder)
    assert f"error: rank 1: out of memory in {where}: CUDA out of memory. Tried to allocate 2.00 GiB" in text, text
    assert "error: predicted for a rank: " in text and "error: this machine has " in text, text
    advice = [line.removeprefix("error:   ") for line in text.splitlines() if line.startswith("error:   ")]
    assert advice[0].startswith(first) and all("(predicted " in line for line in advice), text
    keys = [line.partition("=")[0] for line in advice]
    training = ["batch.micro_size", "train.fused_loss", "train.activation_checkpointing", "zero", "data.seq_length"]
    assert keys == (training if phase == "backward" else ["eval.micro_size", "zero", "data.seq_length"]), text
    assert "Traceback" in (folder / "run/logs/rank_1.log").read_text(), "for who wants to know more"
