"""Kill a job at random until it is through, and see that it ends as if nothing had been: `make test-faults`.

python tests/faults/trials.py [trials=200] [seed=0]

A trial is one death. After each the newest whole checkpoint must be no older than it can be, no process may be left,
and the run must go on from there; the run that gets through must have the metrics and the weights of an unbroken one.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests"), str(root / "tests" / "faults")]

import numpy as np
from jobs import DELAY, PHASES, WORLD, Fault, run_job
from safetensors.numpy import load_file

from launch.runtime.checkpoint import newest

SAME = ("step", "split", "loss", "lr", "grad_norm", "tokens", "samples")
ONCE = ("start", "join", "engine", "resume", "restore", "export", "generation", "close")
"""Phases that come once in each start."""
LATE_S = 1.0
"""Longest delay."""
EVERY = 3
"""As in the arguments of a job."""


def random_fault(chance: random.Random, span_s: float) -> Fault:
    """SIGKILL at any moment, or where a phase begins, to a rank, the launcher or all; SIGTERM one time in five."""
    who: int | str = chance.choice([*range(WORLD), "launcher", "all"])
    if chance.random() < 0.2:
        return Fault(chance.randrange(WORLD), signal.SIGTERM, chance.choice(PHASES))
    if isinstance(who, str) or chance.random() < 0.3:
        return Fault(who, after_s=chance.uniform(0.0, span_s))
    phase = chance.choice(PHASES)
    return Fault(who, phase=phase, at=1 if phase in ONCE else chance.choice((1, 2)))


def random_delays(chance: random.Random) -> list[Fault]:
    """Ranks that come late to where they meet: in another order than they were started in, or in the midst of a run."""
    late = [Fault(chance.randrange(WORLD), DELAY, "start", after_s=chance.uniform(0.0, LATE_S))]
    phases = [phase for phase in PHASES if phase not in ONCE]
    late += [
        Fault(chance.randrange(WORLD), DELAY, chance.choice(phases), chance.choice((1, 2)), chance.uniform(0.0, LATE_S))
        for _ in range(2)
    ]
    return late if chance.random() < 0.5 else []


def rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of a run's metrics, without its times."""
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [{key: row.get(key) for key in SAME} for line in lines if line.endswith("\n") for row in [json.loads(line)]]


def saved(folder: Path) -> int:
    """The step of the newest whole checkpoint, every byte of it read; 0 without one."""
    found = newest(folder / "run" / "checkpoints")
    return found.step if found is not None else 0


def check_through(folder: Path, unbroken: Path) -> None:
    """A run that is through equals one that was never broken: rows and weights."""
    assert rows(folder) == rows(unbroken), f"{folder}: other metrics"
    mine, theirs = (load_file(run / "run/model/model.safetensors") for run in (folder, unbroken))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert not list((folder / "run/checkpoints").glob(".*.tmp")), f"{folder}: half a checkpoint is left"


class Trials:
    """Runs that are killed, one after the other."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._chance = folder, random.Random(seed)
        self.unbroken = folder / "unbroken"
        # The warm-up: what a machine does once (imports, kernels, tokens) is in no trial.
        assert run_job(self.unbroken).code == 0, (self.unbroken / "out_0.log").read_text()
        again = run_job(folder / "timed")
        assert again.code == 0
        self.span_s = again.seconds
        """Seconds of an unbroken job."""
        self.count, self.seen, self.lost = 0, Counter[str](), Counter[int]()
        self._run = self.late = 0

    def one(self) -> None:
        """One death, in a run that goes on until it is through."""
        folder = self._folder / f"run_{self._run}"
        before = saved(folder)
        fault, delays = random_fault(self._chance, self.span_s), random_delays(self._chance)
        outcome = run_job(folder, fault, *delays)
        assert not outcome.orphans, f"{fault}: {outcome.orphans} are left"
        after = saved(folder)
        assert after >= before, f"{fault}: the newest checkpoint was of step {before} and is of {after}"
        taken = max((row["step"] for row in rows(folder)), default=0)
        lost = taken - after
        # One save may be under way while the steps up to the next one are taken.
        assert lost <= 2 * EVERY, f"{fault}: {taken} steps taken, the newest checkpoint is of {after}"
        self.count += 1
        who = fault.who if isinstance(fault.who, str) else "rank"
        self.seen[f"{signal.Signals(fault.signal).name} {who}, {fault.phase or 'any moment'}"] += 1
        self.lost[lost] += 1
        self.late += bool(delays)
        if outcome.code == 0:
            self._finish(folder)
        elif self._chance.random() < 0.2:
            assert run_job(folder).code == 0, (folder / "out_0.log").read_text()[-3000:]
            self._finish(folder)

    def close(self) -> None:
        """The run that is still broken must get through as well."""
        folder = self._folder / f"run_{self._run}"
        if folder.exists():
            assert run_job(folder).code == 0, (folder / "out_0.log").read_text()[-3000:]
            self._finish(folder)

    def _finish(self, folder: Path) -> None:
        check_through(folder, self.unbroken)
        shutil.rmtree(folder)
        self._run += 1

    def report(self) -> str:
        """How many there were, of what, and what they cost."""
        kinds = "\n".join(f"  {count:4d}  {kind}" for kind, count in sorted(self.seen.items()))
        lost = ", ".join(f"{steps}: {count}" for steps, count in sorted(self.lost.items()))
        head = f"{self.count} deaths, {self.late} with ranks that come late, {self._run} runs brought through"
        return f"{head}\n{kinds}\n  steps lost: {lost}"


def main(argv: list[str]) -> int:
    own = {"trials": "200", "seed": "0"} | dict(word.split("=", 1) for word in argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder), int(own["seed"]))
        while trials.count < int(own["trials"]):
            trials.one()
            print(f"\r{trials.count} of {own['trials']}", end="", file=sys.stderr, flush=True)
        trials.close()
    print(f"\n{trials.report()}\n  {time.monotonic() - started:.0f} s, seed {own['seed']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
