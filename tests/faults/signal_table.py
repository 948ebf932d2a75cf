"""What every signal does in every phase of a run, to a rank and to the launcher: the cells that `test_signals.py`
executes, and `python tests/faults/signal_table.py > docs/signals.md` writes down.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.runtime.interruption import EXIT_CODE, STOPPING

LAUNCHER = "launcher"
KILL, SAVE = signal.SIGKILL, signal.SIGUSR1
ANY_FAILURE = "failure"
"""Neither 0 nor 75 nor 2: the launcher's word for a rank that was killed (deepspeed 247, torchrun 1)."""
DIED = "died"
"""Of the signal: the launcher does not hear it. Its ranks see that it is gone."""

BEFORE, STEP, LAST, ALL = "what was there", "every step", "the last checkpoint", "everything"
WORDS = {
    BEFORE: "nothing is lost: no step was taken since the start",
    STEP: "a checkpoint of the last step taken",
    LAST: "the last checkpoint that was whole",
    ALL: "the run comes to its end",
}


@dataclass(frozen=True)
class Phase:
    """name: as in the document. place: as in `jobs.py`. at: which of its beginnings. first_only: rank 0 alone does it.

    stops, killed: what is kept when a rank is asked to stop, and when it is killed.
    """

    name: str
    place: str
    stops: str
    killed: str
    at: int = 1
    first_only: bool = False


PHASES = (
    Phase("preparation of the data", "start", BEFORE, BEFORE),
    Phase("meeting of the ranks", "join", BEFORE, BEFORE),
    Phase("kernel build", "kernels", BEFORE, BEFORE),
    Phase("engine build", "engine", BEFORE, BEFORE),
    Phase("step", "step", STEP, LAST, at=2),
    Phase("restore", "restore", BEFORE, BEFORE),
    Phase("evaluation", "evaluation", STEP, LAST),
    Phase("save", "write", STEP, LAST),
    Phase("export", "export", STEP, LAST, at=2),
    Phase("generation", "generation", ALL, ALL, first_only=True),
    Phase("end", "close", ALL, ALL),
)
"""In an order in which one run can be stopped in all of them, one after the other: three checkpoints, an evaluation
after step 5, 12 steps in all. The export is the last one, where a model of an earlier evaluation stands."""


@dataclass(frozen=True)
class Cell:
    """A signal in a phase. who: a rank or the launcher. code: of the launcher. kept: what the next start finds."""

    phase: Phase
    signal: signal.Signals
    who: int | str
    code: int | str
    kept: str

    def __str__(self) -> str:
        return (
            f"{self.signal.name} to {self.who if isinstance(self.who, str) else f'rank {self.who}'}, {self.phase.name}"
        )


def cell(phase: Phase, number: signal.Signals, who: int | str) -> Cell:
    """What is promised."""
    if who == LAUNCHER:  # the ranks may go on for a second, and then stop as if they had been asked to
        return Cell(phase, number, who, DIED, STEP)
    if number == KILL:
        return Cell(phase, number, who, ANY_FAILURE, phase.killed)
    if number == SAVE:
        return Cell(phase, number, who, 0, ALL)
    return Cell(phase, number, who, 0 if phase.stops == ALL else EXIT_CODE, phase.stops)


def chain(number: signal.Signals, who: int | str) -> list[Cell]:
    """One run, stopped in each phase in turn."""
    return [cell(phase, number, who) for phase in PHASES if not phase.first_only or who in (0, LAUNCHER)]


def covering() -> list[Cell]:
    """Every phase once, every signal at least once, both ranks and the launcher; one run."""
    term, interrupt, hangup = STOPPING
    whos = {
        "start": (term, 1), "join": (interrupt, 0), "kernels": (hangup, 1), "engine": (term, 0), "step": (interrupt, 1),
        "restore": (hangup, 0), "evaluation": (KILL, 1), "write": (term, 0), "export": (term, 1),
        "generation": (interrupt, 0), "close": (hangup, 1),
    }  # fmt: skip
    cells = [cell(phase, *whos[phase.place]) for phase in PHASES]
    return [*cells, cell(PHASES[0], SAVE, 1), cell(PHASES[1], KILL, LAUNCHER)]


HEAD = f"""
# Signals

What a signal does in each phase of a run: the exit code, and what the next start (`resume=auto`) finds.
`tests/faults/signal_table.py` writes this page from the cells that `tests/faults/test_signals.py` executes: every phase
and every signal in `make test`, every cell, on either rank and the launcher, in `make test-all`.

| phase | {", ".join(number.name for number in STOPPING)} to a rank | SIGUSR1 to a rank | SIGKILL of a rank |
| --- | --- | --- | --- |
"""
TAIL = f"""
- **failure**: the launcher's word for a rank that was killed, neither 0, 2 nor 75 (`deepspeed` 247, `torchrun` 1).

One rank is enough: the others stop behind the same step. {EXIT_CODE} is EX_TEMPFAIL: the same command with
`resume=auto` goes on. SIGUSR1 asks for a checkpoint behind the step at hand, and changes nothing else. SIGHUP is
not heard under `nohup`. A second Ctrl-C, two seconds after the first or later, ends the process at once.

Until `launch/train.py` runs its first lines (the imports at the interpreter's start), a signal does what it does to any
program; nothing has begun then. A rank whose main thread waits outside of Python before the first step is ended two
seconds after the signal; later, one that does not come to the end of its step within `checkpoint.grace_s` is ended with
the last whole checkpoint (75), or without one (1). An export asks between two files whether it is to stop; the model
that was there stays, and the next start writes it again. A first compilation that is broken off leaves no compiler,
however it ends.

## The launcher

Any of these signals, SIGUSR1 too, ends `deepspeed` itself at once, with the signal's own exit code. Its ranks look once
a second whether their launcher is there, and stop as for SIGTERM; so they do when it is killed, or when
`launch/supervise.py` above it is. `torchrun` passes SIGTERM, SIGINT and SIGHUP on, and ends with 1;
SIGUSR1 ends it, too. `launch/supervise.py` passes them on and ends with 75, or with 0 where the run was
through; SIGUSR1 goes to rank 0.

Before the ranks have met, and after, `faults.stall_s` ends a run in which nothing happens, with exit code 1 and the
rank that does not go on. While the data are prepared any work counts, and so does waiting for the rank that does it.
"""


def document() -> str:
    """docs/signals.md."""
    lines = []
    for phase in PHASES:
        of_rank = [cell(phase, number, 0) for number in (STOPPING[0], SAVE, KILL)]
        lines.append(f"| {phase.name} | " + " | ".join(map(_shown, of_rank)) + " |")
    kept = [f"- **{kept}**: {words}." for kept, words in WORDS.items()]
    return "\n".join([HEAD.strip(), *lines, "", *kept, *TAIL.strip().splitlines()]) + "\n"


def _shown(one: Cell) -> str:
    return f"{one.code}: {one.kept}"


if __name__ == "__main__":
    print(document(), end="")
