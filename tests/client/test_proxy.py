"""A proxy of the environment: passed by on the way to this machine, used on the way to others."""

import socket
import threading

import pytest

from colaserve_client import Client, Retry, Unavailable
from colaserve_client.cli.exits import line_of
from tests.client.fakes import FakeServer

NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
def test_servers_on_this_machine_are_reached_past_a_proxy(
    server: FakeServer, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    port = server.target.rpartition(":")[2]
    with Client(f"{host}:{port}", retry=Retry(attempts=1), timeout=20) as client:
        assert client.info().name


def test_servers_elsewhere_are_reached_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        client = Client("colaserve.example:50051", retry=Retry(attempts=1), timeout=20)
        with client, pytest.raises(Unavailable) as caught:
            client.info()
        thread.join(20)
    assert asked[0].startswith(b"CONNECT colaserve.example:50051 ")
    assert "http_proxy is set" in line_of(caught.value)
