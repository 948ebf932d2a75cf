"""A disk that fails at the n-th operation of a run: for every n in `make test-all`, for each kind in `make test`.

What must hold: the run goes on, or stops with a message; what is on the disk afterwards is resumed to the bits of a run
that was never broken. The operations are those of the whole process, libraries included (`disk.cpp`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disk import ERRORS, Disk, operations, recorded
from jobs import ARGUMENTS, WORLD, Fault, Outcome, run_job
from power import DONE, HALF, LOST, ZEROS, Fate, Machine, put
from support.tiers import THOROUGH
from trials import check_through, rows

from launch.runtime.checkpoint import newest
from launch.runtime.saving import Saving
from recipes.checksums import SUMS, check_sums
from recipes.durable import recover

pytestmark = pytest.mark.slow
OWN = ("train.steps", "eval.every", "checkpoint")
SHORT_RUN = (
    *(word for word in ARGUMENTS if not word.startswith(OWN)), "train.steps=4", "eval.every=2", "checkpoint.every=1",
    "checkpoint.keep=1", "track.to=[tensorboard,csv]",
)  # fmt: skip
"""Trains, evaluates, saves, prunes and exports; `resume=auto` is among it."""
A_WHILE = 40
"""Operations that fail one after the other on a disk that is full for a while."""
TRIALS = 6
"""Of each start, in `make test`: operations of as many kinds."""
CODES = {
    "open": ("EMFILE", "ENOSPC", "EIO"), "open to read": ("EMFILE", "EIO"), "read": ("EIO",),
    "write": ("ENOSPC", "short", "EIO"), "pwrite": ("ENOSPC", "short", "EIO"),
}  # fmt: skip
OTHER_CODES = ("EIO", "ENOSPC")
MAY_LACK = {"loss.png": "not drawn", "metrics.csv": "Csv cannot write", "evaluations.csv": "Csv cannot write"}
"""What a run that has gone on may lack, if it has said so."""

SAVED = re.compile(r"step (\d+): checkpoint\n")


@dataclass(frozen=True)
class Trial:
    """The `number`th operation of a rank fails, which is `what` in a run without failures."""

    start: str
    rank: int
    number: int
    what: str
    code: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.start} run, rank {self.rank}, operation {self.number} ({self.what}): {self.code} × {self.count}"


class Runs:
    """Runs of one kind from two starts: nothing, and a run that was stopped after step 2."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unbroken = folder / "unbroken"
        (folder / "nothing").mkdir()
        assert self._run(self.unbroken).code == 0, said(self.unbroken)
        stopped = run_job(folder / "stopped", Fault(0, signal.SIGTERM, "step", 3), arguments=SHORT_RUN)
        assert stopped.code == 75, said(folder / "stopped")
        self.trials = [*self._trials("nothing"), *self._trials("stopped")]
        self.seen: dict[str, int] = defaultdict(int)

    def _run(self, folder: Path, disk: Disk | None = None) -> Outcome:
        outcome = run_job(folder, arguments=SHORT_RUN, disk=disk)
        if outcome.code == 2 and "Address already in use" in said(folder):  # taken since the test chose it
            outcome = run_job(folder, arguments=SHORT_RUN, disk=disk)
        return outcome

    def _trials(self, start: str) -> list[Trial]:
        """One for each operation of a run from there."""
        folder = self.folder / f"of_{start}"
        shutil.copytree(self.folder / start, folder)
        assert self._run(folder, Disk()).code == 0, said(folder)
        check(folder, self.unbroken)
        found = []
        for rank in range(WORLD):
            for number, (name, path) in enumerate(operations(folder.with_name(f"{folder.name}.notes"), rank), 1):
                codes = CODES.get(name, OTHER_CODES)
                code = codes[number % len(codes)]
                what = f"{name} {re.sub(r'[0-9]{2,}|tmp[a-z0-9_]{8}', 'N', path)}"
                found.append(Trial(start, rank, number, what, code, 2 if code == "short" else 1))
        shutil.rmtree(folder)
        return found

    def one(self, trial: Trial) -> None:
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / trial.start, folder)
        disk = Disk(trial.rank, trial.number, trial.count, ERRORS[trial.code])
        outcome = self._run(folder, disk)
        text = said(folder)
        assert not outcome.orphans, f"{trial}: {outcome.orphans} are left"
        assert "Traceback" not in text, f"{trial}:\n{text}"
        self.seen["went on" if outcome.code == 0 else f"stopped with {outcome.code}"] += 1
        lacks = tuple(name for name, said_so in MAY_LACK.items() if outcome.code == 0 and said_so in text)
        assert outcome.code in (0, 1, 2), f"{trial}: {outcome.code}\n{text}"
        assert outcome.code == 0 or "error: " in text, f"{trial}: {outcome.code}\n{text}"
        if outcome.code or "no checkpoint: " in text:
            again = self._run(folder)
            assert again.code == 0 and not again.orphans, f"{trial}: then {again.code}\n{text}\n---\n{said(folder)}"
        try:
            check(folder, self.unbroken, lacks)
        except (AssertionError, OSError, ValueError) as error:
            raise AssertionError(f"{trial}: {outcome.code}\n{text}") from error


def said(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("out_*.log")))


def check(folder: Path, unbroken: Path, lacks: tuple[str, ...] = ()) -> None:
    """That a run is through, with the bits of the unbroken one, and whole."""
    check_through(folder, unbroken)
    mine, theirs = (json.loads((run / "run/summary.json").read_text()) for run in (folder, unbroken))
    for summary in (mine, theirs):
        for before in ("train_s", "model"):
            del summary[before]
        for evaluation in ("held_out", "held_out_before"):
            summary[evaluation].pop("eval_s", None)
    assert mine == theirs
    names = {path.name for path in (unbroken / "run").iterdir()} - set(lacks)
    assert names <= {path.name for path in (folder / "run").iterdir()}
    for name in {"metrics.csv", "evaluations.csv"} - set(lacks):
        steps = [[row["step"] for row in csv.DictReader((run / "run" / name).open())] for run in (folder, unbroken)]
        assert steps[0] == steps[1], name
    model = [sorted(path.name for path in (run / "run/model").iterdir()) for run in (folder, unbroken)]
    assert model[0] == model[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("disk"))


def chosen(trials: list[Trial], count: int) -> list[Trial]:
    """One of each of `count` kinds of operation, the same at each run; all in `make test-all`."""
    if THOROUGH:
        return trials
    chance = random.Random(0)
    kinds: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        kinds[f"{trial.rank} {trial.what}"].append(trial)
    names = chance.sample(sorted(kinds), min(count, len(kinds)))
    return [chance.choice(kinds[name]) for name in names]


@pytest.mark.parametrize("start", ["nothing", "stopped"])
def test_an_operation_that_fails(runs: Runs, start: str) -> None:
    for trial in chosen([trial for trial in runs.trials if trial.start == start], TRIALS):
        runs.one(trial)
    print(f"{len(runs.trials)} operations", dict(runs.seen))


def test_a_disk_that_is_full_for_a_while(runs: Runs) -> None:
    trials = [Trial(trial.start, trial.rank, trial.number, trial.what, "ENOSPC", A_WHILE) for trial in runs.trials]
    for trial in trials[:: A_WHILE if THOROUGH else len(trials) // 4]:
        runs.one(trial)
    print(dict(runs.seen))


class Losses:
    """Losses of power in a run: what is on the disk then, and whether what was said holds."""

    def __init__(self, runs: Runs, folder: Path):
        self._runs, self._folder = runs, folder
        source = folder / "recorded"
        outcome = run_job(source, arguments=SHORT_RUN, disk=Disk(record=True))
        assert outcome.code == 0, said(source)
        self.operations = list(recorded(folder / "recorded.notes"))
        self.steps = [row["step"] for row in rows(source)]
        self.seen: dict[str, int] = defaultdict(int)
        machine = Machine()
        for operation in self.operations:
            machine.do(operation)
        put(machine.files(lambda change: DONE), folder / "replayed")
        there, replayed = (
            {path.relative_to(top).as_posix(): path.read_bytes() for path in top.rglob("*") if path.is_file()}
            for top in (source / "run", folder / "replayed/run")
        )
        assert there == replayed, "all that was done to the disk was written down"

    def look(self, every: int, chance: random.Random) -> None:
        """Lose the power behind each `every`th operation, in all ways that are looked at."""
        machine, told, known = Machine(), 0, set[str]()
        for number, operation in enumerate(self.operations, 1):
            machine.do(operation)
            if operation.path == "/out_0.log" and (steps := SAVED.findall(operation.data.decode())):
                told = int(steps[-1])
            if number % every:
                continue
            for way, fate in self._ways(machine, chance):
                files = [(path, data) for path, data in machine.files(fate) if path.partition("/")[0] == "run"]
                digest = hashlib.sha256(repr((told, files)).encode()).hexdigest()
                if digest not in known:
                    known.add(digest)
                    self.seen[way] += 1
                    self._check(files, told, f"after operation {number} of {len(self.operations)}, {way}")

    def _ways(self, machine: Machine, chance: random.Random) -> Iterator[tuple[str, Fate]]:
        waiting = machine.waiting()
        yield "all of the rest is lost", lambda change: LOST
        yield "nothing is lost", lambda change: DONE
        for what in (LOST, HALF, ZEROS):
            for one in chance.sample(waiting, min(2, len(waiting))):
                yield f"one change is {what}", lambda change, one=one, what=what: what if change is one else DONE
        for one in chance.sample(waiting, min(2, len(waiting))):
            yield "only one change is done", lambda change, one=one: DONE if change is one else LOST
        for _ in range(2):
            fates = {id(change): chance.choice((DONE, LOST, HALF, ZEROS)) for change in waiting}
            yield "any part is done", lambda change, fates=fates: fates[id(change)]

    def _check(self, files: list[tuple[str, bytes | None]], told: int, where: str) -> None:
        target = self._folder / "lost"
        shutil.rmtree(target, ignore_errors=True)
        put(iter(files), target)
        run = target / "run"
        Saving(run / "checkpoints", 1, 0, {}, "").sweep()
        recover(run / "model")
        found = newest(run / "checkpoints")
        step = found.step if found else 0
        assert step >= told, f"{where}: step {told} was said to be saved, and {step} is there"
        if found:
            count = found.manifest["progress"]["rows"]
            lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:count]
            assert [json.loads(line)["step"] for line in lines] == self.steps[:count], f"{where}: rows are gone"
        if (run / "model").is_dir():
            check_sums(run / "model")
            assert (run / "model" / SUMS).is_file(), where
        assert not found or not found.manifest["progress"]["kept_at"] or (run / "model").is_dir(), f"{where}: no model"
        for name in ("summary.json", "ds_config.json"):
            if (run / name).is_file():
                json.loads((run / name).read_text())

    def go_on(self, count: int, chance: random.Random) -> None:
        """Resume what is there after `count` losses."""
        for number in sorted(chance.sample(range(len(self.operations)), count)):
            machine = Machine()
            for operation in self.operations[: number + 1]:
                machine.do(operation)
            *_, (way, fate) = self._ways(machine, chance)
            target = self._runs.folder / "lost"
            shutil.rmtree(target, ignore_errors=True)
            put(machine.files(fate), target)
            where = f"after operation {number + 1}, {way}"
            outcome = run_job(target, arguments=SHORT_RUN)
            assert outcome.code == 0, f"{where}: {outcome.code}\n{said(target)}"
            check(target, self._runs.unbroken)


def test_a_loss_of_power(runs: Runs, tmp_path: Path) -> None:
    """What was said to be saved is there, whole, wherever the power goes; and is resumed to the same bits."""
    losses = Losses(runs, tmp_path)
    losses.look(1 if THOROUGH else 7, random.Random(0))
    print(sum(losses.seen.values()), dict(losses.seen))
    losses.go_on(100 if THOROUGH else 3, random.Random(0))
