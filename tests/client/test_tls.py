"""Encrypted connections: the server's certificate is checked, and with mutual TLS the client's."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from colaserve_client import Client, InvalidRequest, Retry, Tls, Unavailable
from tests.authority import make_authority
from tests.client.fakes import FakeServer, start_server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    ours, other = make_authority(folder), make_authority(folder / "other")
    ours.issue("server")
    ours.issue("elsewhere", names="DNS:elsewhere.test")
    ours.issue("client")
    other.issue("stranger")
    return folder


def serve(folder: Path, name: str, *, mutual: bool = False) -> FakeServer:
    pair = ((folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes())
    ca = (folder / "ca.pem").read_bytes() if mutual else None
    return start_server(grpc.ssl_server_credentials([pair], ca, mutual))


@pytest.fixture
def encrypted(certificates: Path) -> Iterator[FakeServer]:
    started = serve(certificates, "server")
    yield started
    started.stop()


@pytest.fixture
def mutual(certificates: Path) -> Iterator[FakeServer]:
    started = serve(certificates, "server", mutual=True)
    yield started
    started.stop()


def test_a_server_of_the_trusted_authority_is_talked_to(encrypted: FakeServer, certificates: Path) -> None:
    with Client(encrypted.target, tls=Tls(certificates / "ca.pem"), key="secret") as client:
        assert client.generate("Once", max_new_tokens=3).text == " th"
    assert encrypted.behaviour.metadata[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "tls",
    [lambda folder: Tls(folder / "other" / "ca.pem"), lambda folder: Tls(), lambda folder: None],
    ids=["another authority", "gRPC's own authorities", "none"],
)
def test_a_server_that_cannot_prove_itself_gets_nothing(encrypted, certificates, tls):
    with Client(encrypted.target, tls=tls(certificates), retry=ONCE, timeout=10) as client, pytest.raises(Unavailable):
        client.generate("Once")
    assert encrypted.behaviour.calls == 0


def test_the_servers_name_is_checked(certificates: Path) -> None:
    server, ca = serve(certificates, "elsewhere"), certificates / "ca.pem"
    try:
        with Client(server.target, tls=Tls(ca), retry=ONCE) as client, pytest.raises(Unavailable):
            client.tokenize("a")
        with Client(server.target, tls=Tls(ca, server_name="elsewhere.test")) as client:
            assert client.tokenize("a").ids == (97,)
    finally:
        server.stop()


def test_mutual_tls_takes_the_clients_certificate(mutual: FakeServer, certificates: Path) -> None:
    tls = Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
    with Client(mutual.target, tls=tls) as client:
        assert client.tokenize("a").ids == (97,)


@pytest.mark.parametrize("name", [None, "stranger"])
def test_mutual_tls_refuses_others(mutual: FakeServer, certificates: Path, name: str | None) -> None:
    other = certificates / "other"
    own = (other / f"{name}.pem", other / f"{name}.key") if name else (None, None)
    tls = Tls(certificates / "ca.pem", *own)
    with Client(mutual.target, tls=tls, retry=ONCE, timeout=10) as client, pytest.raises(Unavailable):
        client.tokenize("a")
    assert mutual.behaviour.calls == 0


def test_a_file_that_is_missing_or_no_certificate_is_named(certificates: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tls\.ca: cannot read .*nowhere\.pem: No such file"):
        Client("localhost:1", tls=Tls(certificates / "nowhere.pem"))
    with pytest.raises(InvalidRequest, match=r"tls\.ca: .* is no PEM file"):
        Client("localhost:1", tls=Tls(certificates / "san.cnf"))
