"""The question sets of the bundled demo checkpoint, which ship with the services and are only read as files here."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from colaserve_client.eval.folder import Task
from colaserve_client.eval.records import EvalError, Question, read_questions

SERVICES = "colaserve_services"
CHECKER = f"{SERVICES}.training.paragraphs"
RULES = {"completions": "begins", "paragraphs": "true_sentences"}  # of the sets whose answers are no short texts


def demo_tasks(folder: Path | None = None) -> list[Task]:
    """One task a file of the demo's question sets, by name; `folder` overrides where they are.

    Raises EvalError when the services are not installed or carry no question sets.
    """
    folder = folder or _demo_folder()
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: the demo's question sets are missing; reinstall colaserve")
    return [Task(file.stem, _with_rule(read_questions(file), RULES.get(file.stem))) for file in files]


def reads_as_true(text: str) -> bool:
    """Whether every sentence of a paragraph about a country is true, by the checker that ships with the demo.

    Raises EvalError when the services, which carry the checker and its table of facts, are not installed.
    """
    try:
        checker = import_module(CHECKER)  # no torch in there
    except ImportError as error:
        raise EvalError(f"paragraphs are judged by {CHECKER}, which is not installed here") from error
    return bool(checker.read_paragraph(text).all_true)


def _with_rule(questions: Sequence[Question], rule: str | None) -> list[Question]:
    return [replace(question, rule=rule) for question in questions]


def _demo_folder() -> Path:
    spec = find_spec(SERVICES)  # finds a top-level package without importing it, hence without torch
    if spec is None or not spec.submodule_search_locations:
        raise EvalError(
            f"the demo's question sets come with the package {SERVICES}, which is not installed here; "
            "pass question files instead"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "demo" / "questions"
