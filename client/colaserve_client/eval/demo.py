"""The question sets of the bundled demo checkpoint, which ship with the services and are only read as files here."""

from importlib.util import find_spec
from pathlib import Path

from colaserve_client.eval.folder import Task
from colaserve_client.eval.records import EvalError, read_questions

SERVICES = "colaserve_services"


def demo_tasks(folder: Path | None = None) -> list[Task]:
    """One task a file of the demo's question sets, by name; `folder` overrides where they are.

    Raises EvalError when the services are not installed or carry no question sets.
    """
    folder = folder or _demo_folder()
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: the demo's question sets are missing; reinstall colaserve")
    return [Task(file.stem, read_questions(file)) for file in files]


def _demo_folder() -> Path:
    spec = find_spec(SERVICES)  # finds a top-level package without importing it, hence without torch
    if spec is None or not spec.submodule_search_locations:
        raise EvalError(
            f"the demo's question sets come with the package {SERVICES}, which is not installed here; "
            "pass question files instead"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "demo" / "questions"
