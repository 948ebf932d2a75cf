"""Is there a network to the hub? Without one the hub's libraries retry for a minute before they look into the cache."""

from __future__ import annotations

import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_without_network() -> None:
    """Switch the hub's libraries to their cache when the name of the hub does not even resolve.

    Does nothing behind a proxy, which may resolve names that this machine cannot.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):  # read the variable when they are imported
            if module in sys.modules:
                sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
