"""Addresses that `specinfer up` holds for its children: who is refused one, and who gets it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specinfer.errors import InvalidRequest
from specinfer_cli.cluster import ClusterSettings, running_cluster
from specinfer_cli.processes import free_port, held_address


@contextmanager
def listening(address: str) -> Iterator[None]:
    """A server at `address`, as servers are: on a port that may have been used just before."""
    host, _, port = address.rpartition(":")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, int(port)))
        server.listen()
        yield


def test_an_address_that_is_in_use_or_none_is_refused() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = f"127.0.0.1:{busy.getsockname()[1]}"
        with (
            pytest.raises(InvalidRequest, match=f"--grpc: cannot listen on {taken}"),
            held_address("--grpc", taken),
        ):
            pytest.fail("an address that is in use was held")
    for bad in ("8000", ":8000", "host:", "host:x", "127.0.0.1:65536"):
        with (
            pytest.raises(InvalidRequest, match="HOST:PORT"),
            held_address("--gateway", bad),
        ):
            pytest.fail("what is no address was held")
    with (
        pytest.raises(InvalidRequest, match="--insecure-bind"),
        held_address("--gateway", "0.0.0.0:0"),
    ):
        pytest.fail("an address that others reach was held")
    with held_address("--gateway", "0.0.0.0:0", insecure_bind=True) as everywhere:
        assert everywhere.startswith("0.0.0.0:")


def test_a_held_address_is_for_who_was_told_of_it() -> None:
    with held_address("--grpc", "localhost:0") as local:
        assert local.startswith("localhost:")
        assert int(local.rpartition(":")[2]) > 0
    with held_address("--grpc", "127.0.0.1:0") as held:
        port = int(held.rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            # Nobody is given it who does not ask for it as a server does.
            other.bind(("127.0.0.1", port))
        with listening(held):
            with pytest.raises(InvalidRequest, match="in use"), held_address("--grpc", held):
                pytest.fail("an address that is listened on was held")
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        # A server that ended may be started again.
        with listening(held):
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with held_address("--grpc", held) as again:
        assert again == held
    assert 0 < free_port() < 65536


@pytest.mark.parametrize("second", ["gateway_address", "admin_address"])
def test_one_address_for_two_doors_is_refused_before_anything_starts(
    second: str, tmp_path: Path
) -> None:
    with held_address("--grpc", "127.0.0.1:0") as address:
        pass
    doors: dict[str, Any] = {"grpc_address": address, second: address}
    with (
        pytest.raises(InvalidRequest, match=f"are {address}; each needs a port of its own"),
        running_cluster(ClusterSettings(tmp_path, logs=tmp_path / "logs", **doors)),
    ):
        pytest.fail("a cluster with two servers at one address")
    assert not (tmp_path / "logs").exists()
