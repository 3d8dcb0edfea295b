"""Encrypted connections: the server's certificate is checked, and with mutual TLS the client's."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from colaserve_client import Client, InvalidRequest, Retry, Tls, Unavailable
from tests.client.fakes import FakeServer, start_server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
ONCE = Retry(attempts=1)


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_authority(folder: Path, name: str) -> None:
    subject = ["-subj", f"/CN={name}", "-days", "1", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl("req", "-x509", *subject, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")


def make_certificate(folder: Path, name: str, authority: str, alternatives: str) -> None:
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", folder / f"{name}.key"]
    openssl("req", *key, "-subj", f"/CN={name}", "-out", request)
    extensions.write_text(f"subjectAltName={alternatives}\n")
    signer = ["-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key", "-CAcreateserial"]
    openssl(
        "x509", "-req", "-in", request, *signer, "-days", "1", "-extfile", extensions, "-out", folder / f"{name}.pem"
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("ca", "other"):
        make_authority(folder, authority)
    make_certificate(folder, "server", "ca", "DNS:colaserve.test,IP:127.0.0.1")
    make_certificate(folder, "elsewhere", "ca", "DNS:elsewhere.test")
    make_certificate(folder, "client", "ca", "DNS:client.test")
    make_certificate(folder, "stranger", "other", "DNS:client.test")
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


@pytest.mark.parametrize("tls", ["another authority", "gRPC's own authorities", "none"])
def test_a_server_that_cannot_prove_itself_gets_nothing(encrypted: FakeServer, certificates: Path, tls: str) -> None:
    settings = {"another authority": Tls(certificates / "other.pem"), "gRPC's own authorities": Tls(), "none": None}
    with Client(encrypted.target, tls=settings[tls], retry=ONCE, timeout=10) as client, pytest.raises(Unavailable):
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
    own = (certificates / f"{name}.pem", certificates / f"{name}.key") if name else (None, None)
    tls = Tls(certificates / "ca.pem", *own)
    with Client(mutual.target, tls=tls, retry=ONCE, timeout=10) as client, pytest.raises(Unavailable):
        client.tokenize("a")
    assert mutual.behaviour.calls == 0


def test_a_file_that_is_missing_or_no_certificate_is_named(certificates: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tls\.ca: cannot read .*nowhere\.pem: No such file"):
        Client("localhost:1", tls=Tls(certificates / "nowhere.pem"))
    with pytest.raises(InvalidRequest, match=r"tls\.ca: .* is no PEM file"):
        Client("localhost:1", tls=Tls(certificates / "server.ext"))
