"""What only a GPU can show, in one command: ceilings, gradients, throughput, memory, offload, whole runs, a death.

    python benchmarks/gpu.py out=FOLDER [minutes=8] [only=b,c.2048,…] [data=FOLDER] [device=cpu size=tiny]

For one GPU of 80 GB or more; needs no network. Each sub-step has a process of its own and a time limit, and its rows
are in FOLDER/gpu.jsonl as soon as there are any: whatever ends this loses one sub-step at most. Another start with the
same FOLDER leaves out what is done at this commit on this device. FOLDER/gpu.md has the tables (`minutes=0` makes them
again), gpu.log what the sub-steps printed. The last line says what was not reached. `device=cpu size=tiny` rehearses
each sub-step on a tiny model, repetitions aside. Exit code 1 when a sub-step failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_steps import journal
from benchmarks.gpu_steps.catalogue import SUB_STEPS, SubStep, chosen
from benchmarks.gpu_steps.context import Context
from benchmarks.gpu_steps.processes import Child, new_scratch
from benchmarks.gpu_steps.tables import last_words, report
from benchmarks.report import publish, run
from conf.environment import detect
from conf.errors import Problem, RequestError, did_you_mean
from launch.runtime.request import split_arguments
from recipes.durable import replace_text

OWN = {"out": "", "minutes": "8", "only": "", "data": "", "device": "auto", "size": "full"}
ENDING_S = 3.0
"""Kept for the tables at the end."""
LEAST_S = 5.0
"""With less than this left nothing is begun."""
CORES_AHEAD = 8
"""With so many cores two sub-steps import and prepare while another one has its turn, else one."""


class InterruptError(Exception):
    """Ctrl-C or SIGTERM."""


class Benchmark:
    """Gives the sub-steps their turns until the time is over."""

    def __init__(
        self, out: Path, options: dict[str, str], facts: journal.Row, sub_steps: list[SubStep], done: set[str]
    ):
        """facts: the first row of this start. done: the sub-steps to leave out."""
        self._out, self._options, self._facts = out, options, facts
        self._journal, self._scratch = out / "gpu.jsonl", new_scratch()
        self._left = deque(s for s in sub_steps if s.key not in done and not s.beside)
        wanted = {s.after for s in self._left}
        self._beside = [s for s in sub_steps if s.beside and (s.key not in done or s.key in wanted)]
        self._deadline = time.monotonic() + 60 * float(options["minutes"]) - ENDING_S
        self._children: dict[str, Child] = {}
        self._failed: set[str] = set()
        self._cut: set[str] = set()
        """Sub-steps whose own time was not over when all time was."""
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """All sub-steps, or those for which there is time; nothing of them is left behind, however this ends."""
        try:
            for sub_step in self._beside:
                self._child(sub_step).go()
            while self._left and self._remaining() > LEAST_S:
                self._turn()
            for sub_step in self._beside:
                self._join(sub_step)
        finally:
            # A second signal does not stop this.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            for child in self._children.values():
                child.end()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _turn(self) -> None:
        sub_step = self._left[0]
        child = self._child(sub_step)
        if not self._is_there(sub_step.after):
            self._closing(sub_step, child, False, f"{sub_step.after} failed")
        else:
            child.go()
            ahead = 2 if (os.cpu_count() or 1) >= CORES_AHEAD else 1
            for later in list(self._left)[1 : 1 + ahead]:
                self._child(later)
            self._close(sub_step, min(sub_step.limit_s, self._remaining()))
        self._left.popleft()
        write_tables(self._out)

    def _is_there(self, key: str) -> bool:
        """Wait for a sub-step that runs beside the others; whether it did what it should."""
        sub_step = next((s for s in self._beside if s.key == key), None)
        if sub_step is not None:
            self._join(sub_step)
        return key not in self._failed | self._cut

    def _join(self, sub_step: SubStep) -> None:
        """Wait for one that runs beside the others."""
        if (child := self._children.get(sub_step.key)) is not None:
            self._close(sub_step, min(sub_step.limit_s, self._remaining() + child.seconds))

    def _child(self, sub_step: SubStep) -> Child:
        if sub_step.key not in self._children:
            context = Context(
                sub_step.step, sub_step.name, self._facts["kind"], self._options["size"], self._options["data"],
                str(self._journal), str(self._scratch / sub_step.key), str(self._out),
            )  # fmt: skip
            self._children[sub_step.key] = Child(sub_step, context, self._scratch)
        return self._children[sub_step.key]

    def _close(self, sub_step: SubStep, limit_s: float) -> None:
        """Wait until a sub-step ends or its time is over, and write its closing row."""
        child = self._children[sub_step.key]
        in_time = child.wait(limit_s)
        ok = in_time and child.code() == 0
        over = "" if in_time else f"\nended after its limit of {limit_s:.0f} s"
        if not in_time and limit_s < sub_step.limit_s:
            over = f"\nthe time is over (minutes={self._options['minutes']}): it had {limit_s:.0f} s"
            self._cut.add(sub_step.key)
        self._closing(sub_step, child, ok, "" if ok else child.error() + over)

    def _closing(self, sub_step: SubStep, child: Child, ok: bool, error: str) -> None:
        seconds = self.seconds[sub_step.key] = round(child.seconds, 1)
        row: dict[str, Any] = {"step": sub_step.step, "name": sub_step.name, "ok": ok, "seconds_in_all": seconds}
        journal.append(self._journal, row if ok else {**row, "error": error})
        child.end()
        child.log_to(self._out / "gpu.log")
        del self._children[sub_step.key]
        cut = sub_step.key in self._cut
        if not ok and not cut:
            self._failed.add(sub_step.key)
        word = "done" if ok else "out of time" if cut else "FAILED"
        print(f"{sub_step.key}: {word}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if not ok:
            print(f"  {last_words(error)}", file=sys.stderr, flush=True)

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def closing_line(self) -> str:
        """What was not reached, and what failed."""
        missing = [s.key for s in [*self._left, *self._beside] if s.key not in self.seconds]
        parts = [f"failed: {', '.join(sorted(self._failed))}"] if self._failed else []
        parts += [f"out of time: {', '.join(sorted(self._cut))}"] if self._cut else []
        parts.append(f"not reached: {', '.join(missing)}" if missing else "all was reached")
        return "; ".join(parts)

    @property
    def code(self) -> int:
        return 1 if self._failed else 0


def write_tables(out: Path) -> list[str]:
    """gpu.md out of gpu.jsonl, in one piece."""
    lines = report(journal.starts(journal.read(out / "gpu.jsonl")))
    replace_text(out / "gpu.md", "\n".join(lines) + "\n")
    return lines


def checked(argv: list[str]) -> tuple[Path, dict[str, str], list[SubStep]]:
    """(folder, options, sub-steps). Raises RequestError with every problem."""
    overrides, options = split_arguments(argv, OWN)
    problems = []
    for word in overrides:
        key, _, value = word.partition("=")
        near = did_you_mean(key, OWN) or "out"
        problems.append(Problem(key, value, f"one of {', '.join(OWN)}", f"{near}={value or OWN[near] or 'FOLDER'}"))
    out = Path(options["out"]).expanduser().absolute()
    if not options["out"]:
        problems.append(Problem("out", "", "the folder for rows and tables", "out=gpu_results"))
    elif out.exists() and not out.is_dir():
        problems.append(Problem("out", options["out"], "a folder, this is a file", f"out={out.parent}"))
    try:
        if not 0 <= float(options["minutes"]) < 24 * 60:
            raise ValueError
    except ValueError:
        problems.append(Problem("minutes", options["minutes"], "a number of minutes, 0 or more", "minutes=8"))
    for key, choices in (("device", ("auto", "cpu", "cuda")), ("size", ("full", "tiny"))):
        if options[key] not in choices:
            near = did_you_mean(options[key], choices) or choices[-1]
            problems.append(Problem(key, options[key], f"one of {', '.join(choices)}", f"{key}={near}"))
    words = [word for word in options["only"].split(",") if word]
    known = sorted({s.step for s in SUB_STEPS} | {s.key for s in SUB_STEPS})
    for word in words:
        if not chosen([word]):
            near = did_you_mean(word, known) or "b"
            problems.append(Problem("only", word, f"steps {', '.join(known)}", f"only={near}"))
    if options["data"] and not Path(options["data"]).expanduser().is_dir():
        problems.append(Problem("data", options["data"], "the folder of the data sets", "leave it out"))
    options["data"] = str(Path(options["data"]).expanduser().absolute()) if options["data"] else ""
    if not problems and float(options["minutes"]) and (problem := _device(options)):
        problems.append(problem)
    if problems:
        raise RequestError(problems)
    return out, options, chosen(words, options["size"] == "tiny")


def _device(options: dict[str, str]) -> Problem | None:
    """Settle `device`, or say why there is none."""
    there = detect().device
    if options["device"] != "cpu" and there != "cuda":
        return Problem("device", options["device"], "this machine has no GPU", "device=cpu size=tiny, a rehearsal")
    options["device"] = "cuda" if options["device"] == "auto" else options["device"]
    if options["device"] == "cpu" and options["size"] == "full":
        return Problem("size", "full", "a CPU would take a day for it", "size=tiny")
    return None


def _interrupt(number: int, frame: object) -> None:
    raise InterruptError(signal.Signals(number).name)


HELP = ("", f"Sub-steps: {', '.join(s.key for s in SUB_STEPS)}")
"""Behind this text, for `--help`."""


def main(argv: list[str]) -> int:
    out, options, sub_steps = checked(argv)
    if not float(options["minutes"]):
        publish(write_tables(out) if out.is_dir() else report([]), "")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.jsonl").open("a", encoding="utf-8").close()
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise RequestError(Problem("out", str(out), rule, "out=gpu_results")) from None
    command = " ".join(["python benchmarks/gpu.py", *(w for w in argv if w.partition("=")[0] not in ("out", "data"))])
    facts = journal.facts(options["device"], options["size"], command)
    journal.append(out / "gpu.jsonl", facts)
    done = next(
        start.done() for start in journal.starts(journal.read(out / "gpu.jsonl"))
        if all(start.facts.get(key) == facts[key] for key in journal.SAME)
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    benchmark = Benchmark(out, options, facts, sub_steps, done)
    code, ended = 0, ""
    try:
        benchmark.run()
        code = benchmark.code
    except InterruptError as error:
        code, ended = 1, f"interrupted by {error}; "
    publish(write_tables(out), "")
    print(ended + benchmark.closing_line(), flush=True)
    return code


if __name__ == "__main__":
    run(main)
