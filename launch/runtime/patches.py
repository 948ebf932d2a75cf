"""What is changed in the engine itself: each with the version, the reason and the test that would miss it."""

from __future__ import annotations

import importlib


def no_shared_memory_kernel() -> None:
    """The engine neither compiles nor loads its all-reduce over shared memory for CPUs.

    deepspeed 0.19.8 builds it in every first start on a CPU, for a minute and with a C++ compiler, and calls it in the
    layers of its own AutoTP only (`inference_all_reduce`), which have no place here and reduce through gloo without it.
    Its ranks spin while they wait, and its buffers of 66 MB a rank stay in /dev/shm when a run is killed.
    Test: tests/launch/test_odd_requests.py, test_deepspeed_0_19_8_compiles_nothing_that_a_run_does_not_use.
    """
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute that name is torch itself
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
