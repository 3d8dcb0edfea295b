"""The question sets of the bundled demo checkpoint, which ship with the services and are only read as files here."""

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from colaserve_eval.folder import Task
from colaserve_eval.records import EvalError, read_records

CHECKER = "colaserve_training.paragraphs"
TRAINED, HELD_OUT = "_trained_phrasings", "_held_out_phrasings"  # how the names of sets end
RULES = {"completions": "begins", "paragraphs": "true_sentences"}  # of the sets whose answers are no short texts


def demo_tasks(package: str = "colaserve_services") -> list[Task]:
    """One task a file of the demo's question sets, by name.

    Raises EvalError when the package that they come with is not installed or carries none.
    """
    spec = find_spec(package)  # finds a top-level package without importing it, hence without torch
    if spec is None or not spec.submodule_search_locations:
        raise EvalError(
            f"the demo's question sets come with the package {package}, which is not installed here; "
            "pass question files instead"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "demo" / "questions"
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: the demo's question sets are missing; reinstall colaserve")
    rules = {file: RULES.get(file.stem) for file in files}
    return [Task(file.stem, [replace(each, rule=rules[file]) for each in read_records(file)]) for file in files]


def held_out_texts() -> list[str]:
    """Texts that the demo was not trained on: its questions in held-out phrasings, each with its answer."""
    tasks = [task for task in demo_tasks() if task.name.endswith(HELD_OUT)]
    return [f"{question.prompt} {question.ground_truth}" for task in tasks for question in task.questions]


def reads_as_true(text: str, checker: str = CHECKER) -> bool:
    """Whether every sentence of a paragraph about a country is true, by the checker that ships with the demo.

    Raises EvalError when the services, which carry the checker and its table of facts, are not installed.
    """
    try:
        module = import_module(checker)  # no torch in there
    except ImportError as error:
        raise EvalError(f"paragraphs are judged by {checker}, which is not installed here") from error
    return bool(module.read_paragraph(text).all_true)
