"""A run in which nothing happens any more is ended, and says which rank does not go on, and where.

Each rank's thread looks at its own main thread. Who notices first leaves a note in the logs folder; the others see it
there and leave theirs; the lowest rank that is alive reads all of them out. A rank whose launcher is gone asks itself
to stop, as SIGTERM does. All of that begins before the ranks have met, while their data are prepared.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.runtime.parents import Launcher
from recipes import durable

POLL_S = 1.0
PATIENCE_S = 5.0
"""What the other ranks have to leave their notes."""
EXIT_CODE = 1
AT_WORK = 0.002
"""CPU time of this process as a share of `stall_s`: with less than that nothing has been prepared. What this thread
itself takes is a quarter of it; a download that is not stuck takes more."""
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/comm.py", "deepspeed/comm/torch.py")


@dataclass(frozen=True)
class Note:
    """Where a rank is. waits_in: what its main thread waits in, a collective call or its GPU, if it waits."""

    rank: int
    doing: str
    beats: int
    place: str
    waits_in: str | None
    stack: str


class Watchdog:
    """Hears of each step (`beat`), and ends the process when it has heard nothing for `stall_s` seconds."""

    def __init__(
        self, folder: Path, rank: int, world: int, stall_s: float, say: Callable[[str], None],
        launcher: Launcher | None = None,
    ):  # fmt: skip
        """folder: of the notes, shared by all ranks. stall_s: 0 for never."""
        self._folder, self._rank, self._world, self._stall_s, self._say = folder, rank, world, stall_s, say
        self._launcher = launcher
        self._last, self._doing, self._beats = time.monotonic(), "start", 0
        self._cpu_s = math.inf
        """CPU time at the last beat, while data are prepared."""
        self._before = {file: file.stat().st_mtime_ns for file in folder.glob("stall_*")}
        """Notes of an earlier run, until rank 0 removes them."""
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def beat(self, doing: str) -> None:
        """The run goes on; `doing` says with what."""
        self._last, self._doing, self._beats, self._cpu_s = time.monotonic(), doing, self._beats + 1, math.inf

    def prepares(self, doing: str) -> None:
        """The data are prepared: from here to the next beat any work counts, and so does the wait for another rank."""
        self._last, self._doing, self._cpu_s = time.monotonic(), doing, time.process_time()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            if self._prepares_still():
                self.prepares(self._doing)
            if self._stall_s and (time.monotonic() - self._last > self._stall_s or self._others()):
                self._end()
            if self._launcher is not None and self._launcher.is_gone():
                self._launcher = None
                self._say(f"rank {self._rank}: the launcher is gone; this rank stops")
                os.kill(os.getpid(), signal.SIGTERM)

    def _prepares_still(self) -> bool:
        """Whether work on the data goes on: libraries load and encode for hours without a word."""
        if time.process_time() - self._cpu_s > AT_WORK * self._stall_s:
            return True
        if self._cpu_s == math.inf or time.monotonic() - self._last < self._stall_s:
            return False
        frames = traceback.walk_stack(sys._current_frames().get(self._main))
        return any("filelock" in Path(frame.f_code.co_filename).parts for frame, _ in frames)

    def _others(self) -> bool:
        return any(self._is_there(rank) for rank in range(self._world) if rank != self._rank)

    def _is_there(self, rank: int) -> bool:
        """Whether a rank of this run has left its note."""
        file = self._file(rank)
        try:
            return file.stat().st_mtime_ns != self._before.get(file)
        except OSError:
            return False

    def _end(self) -> None:
        try:
            durable.make_folder(self._folder)
            durable.replace_text(self._file(self._rank), json.dumps(asdict(self._note())))
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end and not all(map(self._is_there, range(self._world))):
                time.sleep(POLL_S / 4)
            notes = [Note(**json.loads(self._file(rank).read_text(encoding="utf-8")))
                     for rank in range(self._world) if self._is_there(rank)]  # fmt: skip
        except (OSError, ValueError):  # no disk: each for itself
            notes = [self._note()]
        if self._rank == min(note.rank for note in notes):
            self._say(report(notes, self._world, self._stall_s))
        time.sleep(POLL_S)  # the message first, then the launcher's about the exit
        os._exit(EXIT_CODE)

    def _file(self, rank: int) -> Path:
        return self._folder / f"stall_{rank:05d}.json"

    def _note(self) -> Note:
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else traceback.StackSummary()
        calls = [call.name for call in stack if call.filename.endswith(COLLECTIVES) and not call.name.startswith("_")]
        names = [name for name in calls if name not in ("wrapper", "log_wrapper")]
        root = Path(__file__).resolve().parents[2]
        own = [call for call in stack if Path(call.filename).is_relative_to(root) and ".venv" not in call.filename]
        last = own[-1] if own else (stack[-1] if stack else None)
        place = f"{_short(last.filename, root)}:{last.lineno} in {last.name}" if last else "nowhere in Python"
        text = "".join(traceback.format_list(stack[-12:]))
        waits_in = names[0] if names else ("its GPU" if device_is_busy() else None)
        return Note(self._rank, self._doing, self._beats, place, waits_in, text)


def device_is_busy() -> bool:
    """Whether this rank's GPU has something left to do.

    A collective call of nccl returns at once. Who waits for the others then waits for the device, in whatever reads the
    next value from there; who has stopped coming has a device that is through.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return False
        # The device is one of the thread, and this is not the main one.
        return not torch.cuda.default_stream(int(os.environ.get("LOCAL_RANK", "0"))).query()
    except RuntimeError:  # a device that has failed
        return False


def _short(file: str, root: Path) -> str:
    path = Path(file)
    return str(path.relative_to(root)) if path.is_relative_to(root) else file


def report(notes: list[Note], world: int, stall_s: float) -> str:
    """What a person reads: the ranks that do not go on, with their stacks, and what the others wait in."""
    silent = sorted(set(range(world)) - {note.rank for note in notes})
    behind = min(note.beats for note in notes)
    stuck = [note for note in notes if note.waits_in is None]
    # Everyone waits: for those that say nothing, or that came less far.
    if not stuck and not silent and len({note.beats for note in notes}) > 1:
        stuck = [note for note in notes if note.beats == behind]
    waiting = [note for note in notes if note not in stuck]
    lines = [f"error: nothing has happened for {stall_s:g} s (faults.stall_s), in {notes[0].doing}"]
    if silent:
        lines.append(f"  {_ranks(silent)} not even a sign of life: stopped, gone, or on a machine that is")
    for note in stuck:
        lines.append(f"  rank {note.rank} does not go on: {note.place}")
        lines += [f"    {line}" for line in note.stack.splitlines()]
    calls = sorted({(str(note.waits_in), note.place) for note in waiting})
    for call, place in calls:
        ranks = [note.rank for note in waiting if (note.waits_in, note.place) == (call, place)]
        lines.append(f"  {_ranks(ranks)} in {call}, called at {place}")
    if not stuck and not silent and len(calls) > 1:
        lines.append("  they wait for each other in different places")
    return "\n".join(lines)


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: waits"
