"""Ranks of one machine are reached from this machine alone; those of several meet as before."""

from __future__ import annotations

import os

import psutil
import pytest
from ranks import run_ranks

from launch.runtime.rendezvous import meeting_place


def _listening(rank: int, world: int) -> list[str]:
    import torch

    everyone = torch.distributed.new_group(list(range(world)))
    value = torch.ones(1)
    torch.distributed.all_reduce(value)
    torch.distributed.all_reduce(value, group=everyone)
    assert value.item() == world * world
    connections = psutil.Process().net_connections("inet")
    return [found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_nothing_listens_for_other_machines(world):
    places = run_ranks(world, _listening)
    assert any(places), "gloo's own sockets at least"
    assert {place for found in places for place in found} == {"127.0.0.1"}


@pytest.mark.parametrize("environment, sizes, here", [
    ({"MASTER_ADDR": "127.0.0.1"}, (4, 4), True), ({"MASTER_ADDR": "localhost"}, (4, 4), True),
    ({"MASTER_ADDR": "10.0.0.1", "LOCAL_SIZE": "4"}, (4, 4), True), ({"MASTER_ADDR": "10.0.0.1"}, (4, 4), False),
    ({"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "2"}, (4, 2), False), ({}, (1, 1), True),
    ({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, (4, 4), False),
])  # fmt: skip
def test_who_meets_on_this_machine(environment, sizes, here, monkeypatch):
    for name in ("MASTER_ADDR", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert (meeting_place(0, *sizes) is not None) == here
