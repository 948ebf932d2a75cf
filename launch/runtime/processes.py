"""Ranks: who this process is, under which launcher, on which device, with how many threads."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.errors import Problem, RequestError

MOST_FILES = 65536
FILES_OF_A_RANK, FILES_OF_A_PAIR = 56, 4
"""Measured with the quickstart, on one and two ranks (gloo has a connection for each pair of ranks and each group)."""


MANY = 1 << 31
"""More ranks than there are."""


@dataclass(frozen=True)
class Ranks:
    """This process among all (from the environment the launcher made)."""

    rank: int
    local_rank: int
    world: int
    local_world: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read what `deepspeed`, `torchrun` or a plain `python` left in the environment (nothing: one rank).

    Raises RequestError for what no launcher leaves: ranks would wait for others that never come.
    """

    def number(name: str, default: int, below: int) -> int:
        text = os.environ.get(name, str(default))
        if text.isascii() and text.isdigit() and int(text) < below:
            return int(text)
        rule = f"a whole number below {below}" if below < MANY else "a whole number"
        nearest = f"unset {name}, or start the ranks with deepspeed or torchrun"
        raise RequestError(Problem(name, text, f"{rule}, of the environment", nearest))

    world = number("WORLD_SIZE", 1, MANY)
    # The deepspeed launcher calls it LOCAL_SIZE.
    local = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    local_world = number(local, world, world + 1)
    return Ranks(number("RANK", 0, world), number("LOCAL_RANK", 0, max(local_world, 1)), world, local_world)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(ranks: Ranks) -> None:
    """Refuse a rendezvous port that is taken, before anything is prepared. Raises RequestError (--master_port).

    Launchers all start from one default; torch would say so behind a traceback, a data set's preparation later.
    """
    port = os.environ.get("MASTER_PORT", "")
    if not ranks.first or not port.isdigit() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun listens itself
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            rule = f"the ranks cannot meet there ({error.strerror}): another run on this machine?"
            nearest = f"deepspeed --master_port {free_port()} …"
            raise RequestError(Problem("--master_port", port, rule, nearest)) from None


def allow_files(ranks: Ranks) -> None:
    """Let this process open as many files as it may. Raises RequestError (ulimit -n) where that is too few.

    Shells start with soft limits of 1024 or less, meant for select(2); sockets of ranks and shards of models are files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        more = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        with contextlib.suppress(OSError, ValueError):  # macOS has another limit beside it
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, more), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    least = FILES_OF_A_RANK + FILES_OF_A_PAIR * ranks.world
    if soft != resource.RLIM_INFINITY and soft < least:
        rule = f"a process may open so few files here; one of {ranks.world} ranks opens up to {least}"
        raise RequestError(Problem("ulimit -n", str(soft), rule, "ulimit -n 1024, or a higher hard limit"))


def set_environment(ranks: Ranks, device: str) -> None:
    """Complete the rendezvous variables of a plain `python` start and choose the engine's accelerator.

    Must run before deepspeed is imported: it settles on an accelerator then.
    """
    os.environ["DS_ACCELERATOR"] = device
    allow_files(ranks)
    # The engine builds its offload kernels with the ninja of this environment, activated or not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if ranks.world == 1:
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def threads_per_rank(requested: int | None, local_world: int) -> int:
    """CPU threads of this rank: what was asked for, or an equal share of this machine's usable cores, at least one."""
    if requested:
        return requested
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_world)


def join(ranks: Ranks, device: str, threads: int | None = None, stall_s: float | None = None):
    """Start the process group (nccl or gloo) and return this rank's torch.device.

    stall_s: of the watchdog that looks on (`faults.stall_s`); None: there is none.
    """
    import deepspeed
    import torch

    from launch.runtime import patches
    from launch.runtime.rendezvous import meeting_place

    if device == "cuda" and ranks.local_rank >= torch.cuda.device_count():
        rule = f"this machine has {torch.cuda.device_count()} GPUs for {ranks.local_world} ranks"
        raise RequestError(Problem("ranks", str(ranks.local_world), rule, f"--num_gpus {torch.cuda.device_count()}"))
    torch.set_num_threads(threads_per_rank(threads, ranks.local_world))
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
        # precision=fp32 is fp32: torch 2.13 lets convolutions round what they multiply to TF32's 10 bits unasked.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        patches.no_shared_memory_kernel()
        # Torch's own 30 minutes would end the wait before the watchdog can say who is missing.
        patience = {} if stall_s is None else {"timeout": _longest(stall_s)}
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            init_method=meeting_place(ranks.rank, ranks.world, ranks.local_world),
            **patience,
        )
    return torch.device(device, ranks.local_rank) if device == "cuda" else torch.device("cpu")


def wait_for_others(stall_s: float) -> None:
    """Collective calls of all groups that there are wait longer than the watchdog does (`faults.stall_s`, 0: for ever).

    deepspeed 0.19.8 gives its group ten minutes, torch 2.13 any other nccl group as long: a rank that waits for what
    rank 0 does alone (metrics, the export) would be ended by them, without the watchdog's word of who is behind.
    """
    import torch
    from torch.distributed import distributed_c10d as c10d

    if torch.distributed.is_initialized():
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(_longest(stall_s), group)


def _longest(stall_s: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=2 * stall_s + 600) if stall_s else datetime.timedelta(days=365)


_left_open = False


def leave(broken: bool = False) -> None:
    """Close the process group, if there is one, so that this process (a notebook, say) may join another.

    broken: this rank gives up, and others may be in a collective call. nccl closes a communicator on all ranks of a
    machine together (ncclCommDestroy): a rank that did it alone would hang there instead of saying why. Its group stays
    open, and the process must end by `os._exit` (`must_exit`).
    """
    import torch
    from deepspeed import comm

    global _left_open
    if not comm.is_initialized():
        return
    if broken and torch.distributed.get_world_size() > 1 and torch.distributed.get_backend() == "nccl":
        _left_open = True
        return
    # Not torch's own call: deepspeed 0.19.8 would keep groups that no longer exist.
    comm.destroy_process_group()


def must_exit() -> bool:
    """Whether the interpreter's own end would wait for the other ranks of a group that was left open."""
    return _left_open
