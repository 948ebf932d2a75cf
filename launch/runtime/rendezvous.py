"""Where the ranks of one machine meet: in a place that no other machine reaches.

torch 2.13's `env://` has rank 0 listen on all addresses of its machine, without asking who comes: whoever reaches the
port can read and write what the ranks agree on. For one machine it is the loopback interface, for one rank no socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

LOOPBACK = "127.0.0.1"
SCHEME = "this-machine"


def meeting_place(rank: int, world: int, local_world: int) -> str | None:
    """The `init_method` of these ranks; None (`env://`) for several machines, and for torchrun, whose agent listens."""
    if not on_one_machine(world, local_world):
        return None
    if "lo" in (name for _, name in socket.if_nameindex()):
        # gloo listens where the machine's own name leads, which may be an address of the network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    from torch.distributed.rendezvous import register_rendezvous_handler

    with contextlib.suppress(RuntimeError):  # it is registered already, in a notebook's second run
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://?rank={rank}&world_size={world}"


def on_one_machine(world: int, local_world: int) -> bool:
    """Whether all ranks are on this machine: they meet on its loopback interface, or the launcher said how many are."""
    said = {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & os.environ.keys()
    return world == 1 or _is_loopback(os.environ.get("MASTER_ADDR", "")) or bool(said and local_world == world)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _meet(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Any, int, int]]:
    """A handler of torch's: the store, the rank and the number of ranks."""
    from urllib.parse import parse_qs, urlsplit

    from torch.distributed import HashStore, TCPStore

    rank, world = (int(parse_qs(urlsplit(url).query)[name][0]) for name in ("rank", "world_size"))
    if world == 1:
        yield HashStore(), rank, world
    else:
        port = int(os.environ["MASTER_PORT"])
        listening = _listen(port) if rank == 0 else None
        yield TCPStore(LOOPBACK, port, world, rank == 0, timeout, master_listen_fd=listening), rank, world
    raise RuntimeError("these ranks have met already")


def _listen(port: int) -> int:
    """The descriptor of a socket that listens on the loopback interface; torch closes it. Raises OSError."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(2048)
        return listening.detach()
