"""Distributed tests without a launcher: ranks forked from a server that has imported torch, deepspeed, transformers.

A cold start costs 7 s per rank, a fork some milliseconds. The server process never computes, so its children inherit no
OpenMP threads (a fork of a process that has used them hangs).
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from launch.runtime.processes import free_port, join, ranks_from_environment

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch", "deepspeed", "transformers", "launch.runtime.engine", "recipes.causal_lm", "launch.train",
        "launch.runtime.staged", "launch.runtime.plots", "transformers.models.llama.modeling_llama",
    ]
)  # fmt: skip


def _child(rank: int, world: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        import torch

        join(ranks_from_environment(), "cpu", threads=1)
        pipe.send((True, function(rank, world, *arguments)))
        torch.distributed.barrier()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """Run `function(rank, world, *arguments)` (a module-level function) on `world` gloo ranks; their results by rank.

    Results are pickled: numpy arrays, not tensors (whose shared memory dies with the rank).

    The first failing rank's traceback is raised, the others are killed; nothing outlives the call.
    """
    port, processes, pipes = free_port(), [], {}
    for rank in range(world):
        receive, send = _context.Pipe(duplex=False)
        process = _context.Process(target=_child, args=(rank, world, port, send, function, arguments), daemon=True)
        process.start()
        send.close()
        processes.append(process)
        pipes[receive] = rank
    results, deadline = {}, time.monotonic() + timeout_s
    try:
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pipes.values())} of {world} still run after {timeout_s} s")
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, "the process died"
                if not good:
                    raise AssertionError(f"rank {rank} of {world}:\n{value}")
                results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=5 if len(results) == world else 0)
            process.kill()
            process.join()
    return [results[rank] for rank in range(world)]
