"""Keep a run going: `python launch/supervise.py [ranks=N] [least=1] [restarts=10] [backoff_s=5] +recipe=NAME …`.

Starts `deepspeed --num_gpus N launch/train.py … resume=auto`, and again from its newest whole checkpoint when it dies:
at most `restarts` times, each time twice as long after the last (from backoff_s up to five minutes) unless the run got
further. With the ranks that are left: GPUs that went away are not counted on, and after two starts in a row that got no
further it goes on with fewer ranks, never fewer than `least`. Then it says what the interruptions cost (goodput).
Ctrl-C and SIGTERM reach the run, which saves a checkpoint; the exit code is 75 then. So does SIGUSR1, which asks for a
checkpoint only. When this process is killed its ranks save and end, too; one that is started anew waits for that, as it
does for any other run that is at work in the folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Started as a script, launch/ is on sys.path; the rooms are found from the repository root, from any working directory.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
from filelock import FileLock, Timeout

from conf.compose import compose
from conf.environment import detect
from conf.errors import Problem, RequestError
from conf.schema import Config
from launch.runtime.checkpoint import all_of
from launch.runtime.interruption import EXIT_CODE
from launch.runtime.parents import SUPERVISOR
from launch.runtime.processes import free_port
from launch.runtime.request import run_command, split_arguments

OWN = {"ranks": "", "least": "1", "restarts": "10", "backoff_s": "5"}
LONGEST_BACKOFF_S = 300.0
TRIES = 2
"""Starts in a row that got no further, before fewer ranks are tried."""


@dataclass
class Record:
    """What happened to a run. Seconds are wall time."""

    started: float
    restarts: int = 0
    in_vain: int = 0
    """Starts in a row after which the run was no further."""
    lost_steps: int = 0
    waited_s: float = 0.0


class Supervisor:
    """Starts a run until it is through."""

    def __init__(self, overrides: list[str], own: dict[str, int], cfg: Config):
        self._overrides, self._own = overrides, own
        self._run_dir = Path(cfg.run_dir).expanduser().absolute()
        self._grace_s = cfg.checkpoint.grace_s
        self._asked = False
        self._child: subprocess.Popen[bytes] | None = None
        self._record = Record(time.monotonic())
        self._rows_before = self._rows()

    def run(self) -> int:
        """The exit code of the run in the end."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._pass_on)
        signal.signal(signal.SIGUSR1, self._ask_for_a_checkpoint)
        ranks, record = self._own["ranks"], self._record
        while True:
            self._wait_for_the_folder()
            if self._asked:
                code = EXIT_CODE
                break
            before = self._saved()
            code = self._once(ranks)
            if code == 2 and self._is_busy():  # another run was quicker
                continue
            if code == 0 or code == 2 or self._asked:
                break
            seen, saved = self._seen(), self._saved()
            record.lost_steps += max(0, seen - max(saved, 0))
            record.in_vain = 0 if saved > before else record.in_vain + 1
            if record.restarts == self._own["restarts"]:
                self._say(
                    f"ended with exit code {code} for the {record.restarts + 1}th time (restarts={record.restarts})"
                )
                break
            record.restarts += 1
            ranks = self._left(ranks)
            wait = min(LONGEST_BACKOFF_S, self._own["backoff_s"] * 2.0 ** max(0, record.in_vain - 1))
            where = f"from step {saved}" if saved >= 0 else "from its start"
            self._say(f"ended with exit code {code}; on {ranks} ranks {where}, in {wait:g} s")
            self._wait(wait)
            if self._asked:
                break
        self._say(self._goodput())
        return EXIT_CODE if self._asked and code not in (0, 2) else code

    def _once(self, ranks: int) -> int:
        train = Path(__file__).resolve().with_name("train.py")
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(free_port()), str(train), *self._overrides, "resume=auto",
        ]  # fmt: skip
        # A session of its own: whatever the launcher leaves behind, is found by it and ended.
        surroundings = {**os.environ, SUPERVISOR: str(os.getpid())}
        self._child = subprocess.Popen(command, start_new_session=True, env=surroundings)
        if self._asked:  # meanwhile
            self._stop_child()
        code = self._child.wait()
        deadline = time.monotonic() + (self._grace_s if self._asked else 0.0) + 5.0
        while _alive(self._child.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        _signal(self._child.pid, signal.SIGKILL)
        return code

    def _is_busy(self) -> bool:
        """Whether a run is at work in the folder: another one, or what a killed supervisor has left."""
        lock = self._run_dir / ".lock"
        if not lock.exists():
            return False
        try:
            FileLock(lock).acquire(timeout=0).lock.release()
        except Timeout:
            return True
        return False

    def _wait_for_the_folder(self) -> None:
        if not self._is_busy():
            return
        self._say(f"another run is at work in {self._run_dir}; waiting for its end")
        started = time.monotonic()
        while not self._asked and self._is_busy():
            time.sleep(0.5)
        self._record.waited_s += time.monotonic() - started
        if self._child is None:
            self._rows_before = self._rows()

    def _pass_on(self, number: int, frame: object) -> None:
        self._asked = True
        self._stop_child()

    def _ask_for_a_checkpoint(self, number: int, frame: object) -> None:
        for rank in ranks_below(self._child.pid)[:1] if self._child is not None else ():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)

    def _stop_child(self) -> None:
        """Ask the ranks alone: the launcher would kill them 30 s later, and ends by itself when they do."""
        if self._child is None:
            return
        ranks = ranks_below(self._child.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.terminate()
        if not ranks:
            _signal(self._child.pid, signal.SIGTERM)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._asked and time.monotonic() < end:
            time.sleep(0.1)
        self._record.waited_s += seconds

    def _left(self, ranks: int) -> int:
        """The ranks for the next start: no more than GPUs, and fewer after starts in vain; a legal number of them."""
        environment = detect()
        most = min(ranks, environment.device_count) if environment.device == "cuda" else ranks
        if self._record.in_vain and self._record.in_vain % TRIES == 0:
            most = min(most, ranks - 1)
        for world in range(most, self._own["least"] - 1, -1):
            try:
                compose([*self._overrides, "resume=auto"], world)
            except RequestError:
                continue
            return world
        return ranks

    def _saved(self) -> int:
        """The step of the newest checkpoint; -1 without one."""
        found = (found for _, found in all_of(self._run_dir / "checkpoints") if found is not None)
        return max((checkpoint.step for checkpoint in found), default=-1)

    def _rows(self) -> list[dict[str, object]]:
        file = self._run_dir / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _seen(self) -> int:
        """The last step that is in the metrics."""
        return max((int(str(row["step"])) for row in self._rows()), default=0)

    def _goodput(self) -> str:
        """Share of the wall time that went into steps (and evaluations) that are part of the run.

        Of those that were taken since; the rows of earlier starts stand before them.
        """
        wall = time.monotonic() - self._record.started
        rows = self._rows()
        pairs = itertools.zip_longest(rows, self._rows_before[: len(rows)])
        own = [row for row, _ in itertools.dropwhile(lambda pair: pair[0] == pair[1], pairs)]
        useful = sum(float(str(row.get("step_s", row.get("eval_s", 0.0)))) for row in own)
        record = self._record
        return (
            f"goodput {min(1.0, useful / wall):.2f}: {useful:.0f} s of {wall:.0f} s in steps that count;"
            f" {record.restarts} restarts, {record.lost_steps} steps lost, {record.waited_s:.0f} s waited"
        )

    @staticmethod
    def _say(text: str) -> None:
        print(f"supervise: {text}", flush=True)


def ranks_below(pid: int) -> list[psutil.Process]:
    """The training processes that a launcher has started."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            words = child.cmdline()
            if any(word.endswith("train.py") for word in words) and not any("deepspeed.launcher" in w for w in words):
                found.append(child)
    return found


def _alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except OSError:
        return False
    return True


def _signal(session: int, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody is left in it
        os.killpg(session, number)


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    overrides, texts = split_arguments(argv, OWN)
    environment = detect()
    texts["ranks"] = texts["ranks"] or str(environment.device_count)
    own = {}
    for key, text in texts.items():
        least = 0 if key in ("restarts", "backoff_s") else 1
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise RequestError(
                Problem(key, text, f"must be a whole number, at least {least}", f"{key}={OWN[key] or 2}")
            )
        own[key] = int(text)
    if any(override.partition("=")[0].lstrip("+") == "resume" for override in overrides):
        raise RequestError(Problem("resume", "", "supervised runs have resume=auto", "leave it out"))
    cfg = compose([*overrides, "resume=auto"], own["ranks"])
    if not cfg.checkpoint.every and cfg.checkpoint.minutes is None:
        rule = "a run without checkpoints starts at step 0 each time"
        raise RequestError(Problem("checkpoint.every", "0", rule, "checkpoint.every=50, or checkpoint.minutes=10"))
    return Supervisor(overrides, own, cfg).run()


if __name__ == "__main__":
    run_command(main, answers=False)
