"""Certificate authorities and what they sign, made by the openssl program."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder, and what it signed."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def issue(
        self, name: str, common_name: str = "localhost", names: str = "DNS:localhost,IP:127.0.0.1"
    ) -> tuple[Path, Path]:
        """Write name.pem and name.key for these names; again with other contents when they are there."""
        key, request, cert = (self.folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        extension = self.folder / "san.cnf"
        extension.write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\n")
        _openssl("req", *KEY, key, "-out", request, "-subj", f"/CN={common_name}")
        signer = ("-CA", self.ca, "-CAkey", self.folder / "ca.key", "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *signer, "-out", cert, "-days", "2", "-extfile", extension)
        return cert, key

    def issue_folder(self, name: str, ca: bool = True) -> Path:
        """A folder as --tls takes it."""
        folder = self.folder / name
        folder.mkdir()
        cert, key = self.issue(name)
        files = {"tls.crt": cert, "tls.key": key, **({"ca.crt": self.ca} if ca else {})}
        for inside, file in files.items():
            (folder / inside).write_bytes(file.read_bytes())
        return folder


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_authority(folder: Path) -> Authority:
    folder.mkdir(exist_ok=True)
    made = Authority(folder)
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # which Python 3.13 asks for
    _openssl(
        "req", "-x509", *KEY, folder / "ca.key", "-out", made.ca, "-days", "2", "-subj", "/CN=test authority", *usage
    )
    return made
