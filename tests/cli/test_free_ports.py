"""Ports handed out before anything listens on them."""

from __future__ import annotations

import socket

import pytest

from easyspec.cli import free_ports
from easyspec.cli.free_ports import free_port
from easyspec.errors import ConfigurationError

LOOPBACK = "127.0.0.1"


@pytest.fixture
def few_ports(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    ports = (free_port(LOOPBACK), free_port(LOOPBACK))
    monkeypatch.setattr(free_ports, "_CANDIDATES", ports)
    monkeypatch.setattr(free_ports, "_given", set())
    return ports


def test_no_port_is_given_twice_though_nothing_listens_yet(few_ports: tuple[int, int]) -> None:
    assert {free_port(LOOPBACK) for _ in few_ports} == set(few_ports)
    with pytest.raises(ConfigurationError, match=r"no port of '127\.0\.0\.1'"):
        free_port(LOOPBACK)


def test_a_port_in_use_is_passed_over(few_ports: tuple[int, int]) -> None:
    with socket.socket() as busy:
        busy.bind((LOOPBACK, few_ports[0]))
        busy.listen()
        assert free_port(LOOPBACK) == few_ports[1]


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on '192\.0\.2\.1'"):
        free_port("192.0.2.1")
