"""docs/architecture.md names what exists, and all packages; pages link to what is there, in lines that can be read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ROOT / "services" / "colaserve_services"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`([\w/]+\.py)(?:::[\w.]+)?`", PAGE)))
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", PAGE)))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def located(path: str) -> Path:
    return ROOT / path if path.split("/")[0] in {"services", "client", "protos", "tests"} else SERVICES / path


def defined(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """What a module or class defines, each name with the body of its definition."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node.body
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found[target.id] = []
    return found


def test_every_question_is_answered_with_names() -> None:
    answers = re.split(r"^\*\*.*\?\*\*", PAGE, flags=re.MULTILINE)[1:]
    assert len(answers) >= 4
    assert all(re.search(r"`[\w/]+\.py::", answer) for answer in answers)


@pytest.mark.parametrize("path", FILES)
def test_every_named_file_exists(path: str) -> None:
    assert located(path).is_file()


@pytest.mark.parametrize(("path", "name"), NAMED, ids="::".join)
def test_every_named_class_and_function_exists(path: str, name: str) -> None:
    body = ast.parse(located(path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        names = defined(body)
        assert part in names, f"{path} defines no {name}"
        body = names[part]


def test_every_package_is_mentioned() -> None:
    inside = {path.parent.name for path in SERVICES.glob("*/__init__.py")}
    beside = {path.parent.name for folder in ("services", "client") for path in ROOT.glob(f"{folder}/*/__init__.py")}
    assert not {name for name in inside | beside if not re.search(rf"`(\w+/)?{name}/?`", PAGE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        led = (page.parent / path).resolve() if path else page
        assert led.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", led.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "reference"], ids=lambda page: page.name
)
def test_lines_have_at_most_120_characters(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


def test_the_versions_in_the_readmes_table_of_clients_are_those_that_ci_installs():
    [table] = re.findall(r"### Clients that were run\n.*?\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    files = ("tests/interop/requirements.txt", "tests/interop/page.py", "constraints.txt", "docs/integrations.md")
    pins = "\n".join((ROOT / name).read_text() for name in files)
    for row in table.splitlines()[2:]:
        names, versions = (cell.strip().replace("`", "").split(", ") for cell in row.split("|")[1:3])
        for name, version in zip(names, versions, strict=True):
            known = rf"(?:^|\W){re.escape(name)}[\w\[\],-]*(?:==| ){re.escape(version)}\b"
            assert version == "as in constraints.txt" or re.search(known, pins), (name, version)
