"""Distributed tests without a launcher: ranks forked from a server that has imported torch, deepspeed, transformers."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from support.server import Line
from support.warm import FULL, rank_environment

from launch.runtime.processes import free_port, join, ranks_from_environment


def _rank(
    line: Line, rank: int, world: int, environment: dict[str, str], function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(environment)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        import torch

        join(ranks_from_environment(), "cpu", threads=1)
        line.send((True, function(rank, world, *arguments)))
        torch.distributed.barrier()
    except BaseException:
        line.send((False, traceback.format_exc()))
    os._exit(0)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Run `function(rank, world, *arguments)` (a module-level function) on `world` gloo ranks; their results by rank.

    Results are pickled: numpy arrays, not tensors (whose shared memory dies with the rank).

    The first failing rank's traceback is raised, the others are killed; nothing outlives the call.
    """
    port = free_port()
    ranks = [
        FULL.start(_rank, rank, world, {**os.environ, **rank_environment(rank, world, port)}, function, arguments)
        for rank in range(world)
    ]
    waiting = {child.connection: rank for rank, child in enumerate(ranks)}
    results, deadline = {}, time.monotonic() + timeout_s
    try:
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {world} still run after {timeout_s} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    good, value = ranks[rank].receive()
                except EOFError:
                    good, value = False, f"the process died with exit code {ranks[rank].code}"
                if not good:
                    raise AssertionError(f"rank {rank} of {world}:\n{value}")
                results[rank] = value
    finally:
        for child in ranks:
            child.wait(5 if len(results) == world else 0)
            child.kill()
    return [results[rank] for rank in range(world)]
