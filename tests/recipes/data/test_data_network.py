"""Without a network, the hub's libraries look into their cache at once."""

from __future__ import annotations

import os
import socket

import huggingface_hub.constants
import pytest

from recipes.data import network


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")


def no_name(*args):
    raise socket.gaierror(-2, "Name or service not known")


def test_offline_when_the_name_does_not_resolve(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    network.offline_without_network()
    assert huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_online_when_it_does_or_a_proxy_may_know_it(monkeypatch):
    asked = []
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443/api")
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: asked.append(host))
    network.offline_without_network()
    assert asked == ["hub.example"] and not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(network, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    network.offline_without_network()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
