"""Dependencies point one way (docs/architecture.md, "The tree"): each package imports only what it may."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ROOT / "services" / "colaserve_services"
CLIENT = ROOT / "client" / "colaserve_client"
EVAL = ROOT / "client" / "colaserve_eval"
TRAINING = ROOT / "services" / "colaserve_training"
BENCH = ROOT / "services" / "colaserve_bench"

WIRE = (
    "grpc",
    "grpc_health",
    "grpc_reflection",
    "grpc_status",
    "google.protobuf",
    "google.rpc",
    "colaserve.v1",
    "colaserve_services.inference",
)
OWN = "colaserve_services"
MEASURING = ("colaserve_training", "colaserve_bench", "colaserve_eval")  # what neither serves nor calls


def own(packages: str) -> tuple[str, ...]:
    return tuple(f"{OWN}.{package}" for package in packages.split())


NETWORKS = own("model.checkpoint model.dit model.flow model.layers model.loading model.modulation model.text_vae")

# Folder or file -> what may not be imported there, with the reason to show.
FORBIDDEN: dict[Path, tuple[str, ...]] = {
    CLIENT: ("torch", "tokenizers", "starlette", OWN, *MEASURING),
    EVAL: ("torch", "tokenizers", "starlette", OWN, "colaserve_training", "colaserve_bench"),
    SERVICES: MEASURING,
    SERVICES / "model": (*WIRE, *own("rpc encoder prior decoder coordinator gateway launch")),
    SERVICES / "engine": (*WIRE, *own("rpc encoder prior decoder coordinator gateway"), *NETWORKS),
    SERVICES / "text": (*WIRE, "torch"),
    SERVICES / "coordinator": ("torch", *own("gateway model encoder prior decoder engine")),
    SERVICES / "inference": ("torch", *own("gateway model encoder prior decoder engine launch")),
    SERVICES / "gateway": ("torch", *own("model encoder prior decoder engine coordinator text")),
    SERVICES / "encoder" / "engine.py": WIRE,
    SERVICES / "decoder" / "engine.py": WIRE,
    SERVICES / "prior" / "engine.py": WIRE,
    SERVICES / "prior" / "sampling_run.py": WIRE,
    SERVICES / "encoder": own("prior decoder coordinator gateway launch"),
    SERVICES / "decoder": own("prior encoder coordinator gateway launch"),
    SERVICES / "prior": own("encoder decoder coordinator gateway launch"),
    TRAINING: (*WIRE, *own("coordinator gateway rpc launch"), "colaserve_bench"),
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Names of the modules a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


CODE = [path for place in (SERVICES, TRAINING, BENCH, CLIENT, EVAL) for path in files(place)]


@pytest.mark.parametrize("place", FORBIDDEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_it_may(place: Path) -> None:
    assert files(place), f"{place} is gone; correct this table"
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(place)
        for name in imports(path)
        if any(name == banned or name.startswith(f"{banned}.") for banned in FORBIDDEN[place])
    ]
    assert not found


def test_engines_ask_no_device_what_it_is() -> None:
    """What computes is chosen in model/backend/pick.py."""
    packages = (SERVICES / name for name in ("engine", "prior", "decoder", "encoder"))
    asking = [path for package in packages for path in files(package) if "device.type" in path.read_text("utf-8")]
    assert not asking


OWN_READING = {  # what reads or writes text without the client's reading.py and writing.py, and why
    CLIENT / "reading.py": "is it",
    CLIENT / "writing.py": "is it",
    CLIENT / "cli" / "verbs.py": "a package's metadata, through importlib",
    EVAL / "templates.py": "package data",
    BENCH: "/proc, and files that a benchmark just wrote",
}


def test_text_is_read_and_written_in_one_place() -> None:
    ways = (".read_text(", ".write_text(", ".write_bytes(", "sys.stdin.buffer")
    found = [
        f"{path.relative_to(ROOT)} has {way}"
        for path in CODE
        if not any(path == own or own in path.parents for own in OWN_READING)
        for way in ways
        if way in path.read_text(encoding="utf-8")
    ]
    assert not found, "use colaserve_client.reading and colaserve_client.writing"


def test_both_distributions_have_one_version() -> None:
    services, client = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "client")
    )
    assert services["version"] == client["version"]
    assert services["dependencies"] == [f"colaserve-client=={client['version']}"]


def test_no_pickle_anywhere() -> None:
    banned = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal")
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in CODE
        for name in imports(path)
        if name.split(".")[0] in banned
    ]
    assert not found
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, f"{path}: torch.load reads pickles; use safetensors"
        assert "torch.save(" not in text, f"{path}: torch.save writes pickles; use safetensors"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="scripts/size counts what git tracks")
def test_files_and_functions_stay_short() -> None:
    done = subprocess.run([ROOT / "scripts" / "size"], capture_output=True, text=True, check=True, timeout=60)
    assert re.findall(r"^(?:files|functions) over .* (\d+)$", done.stdout, re.MULTILINE) == ["0", "0"], done.stdout
