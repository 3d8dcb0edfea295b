"""The folder of a run: a jsonl file of outputs a task, the settings they were made with, and how long it took.

A folder holds the outputs of one setting only: going on with another is refused, naming the difference. Every output is
appended as soon as it is there, in one write, so that an interrupted run loses only the questions in flight.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colaserve_client.writing import named, write_file
from colaserve_eval.records import (
    EvalError,
    Output,
    Question,
    QuestionId,
    encode_line,
    json_text,
    read_object,
    read_outputs,
    write_outputs,
)

SETTINGS_FILE, SPEED_FILE, LOCK_FILE = "settings.json", "speed.json", ".lock"


@dataclass(frozen=True)
class Task:
    """The questions of one file."""

    name: str  # the outputs' file name without .jsonl; decides the scoring rule
    questions: Sequence[Question]

    @property
    def digest(self) -> str:
        """SHA-256 over the questions as they are asked: another template or another order is another task."""
        lines = "".join(encode_line(question.to_json()) for question in self.questions)
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Speed:
    """What was asked and how long it took, summed over the attempts of a run that were not killed."""

    seconds: float = 0.0  # wall clock
    completion_tokens: int = 0
    answers: int = 0

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(
            self.seconds + other.seconds,
            self.completion_tokens + other.completion_tokens,
            self.answers + other.answers,
        )

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second of wall clock; 0 when nothing was measured."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class OutputLog:
    """The outputs of one task: what an earlier attempt left, and what this one adds."""

    def __init__(self, path: Path):
        """Read what is there, dropping a torn last line and outputs that failed: those are asked again."""
        self.path = path
        self._outputs: dict[QuestionId, Output] = {}
        if path.exists():
            _drop_torn_line(path)
        if path.exists() and path.stat().st_size:
            found = read_outputs(path)
            self._outputs = {output.id: output for output in found if output.error is None}
            if len(self._outputs) < len(found):
                write_outputs(path, self._outputs.values())

    def missing(self, questions: Sequence[Question]) -> list[tuple[int, Question]]:
        """The questions without an output, in order, each with its place among all."""
        return [(place, question) for place, question in enumerate(questions) if question.id not in self._outputs]

    def append(self, output: Output) -> None:
        """Add an output; the line is with the system when this returns."""
        assert output.id not in self._outputs, f"{output.id!r} has an output already"
        self._outputs[output.id] = output
        with named(self.path), open(self.path, "ab") as file:
            file.write(encode_line(output.to_json()).encode())

    def sort(self, questions: Sequence[Question]) -> None:
        """Put the file into the order of the questions."""
        found = [self._outputs[question.id] for question in questions if question.id in self._outputs]
        if found:
            write_outputs(self.path, found)


class RunFolder:
    """One run's folder. Use `opened`, which checks the settings and keeps other runs out."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    @contextmanager
    def opened(cls, path: Path, settings: Mapping[str, Any], tasks: Sequence[Task]) -> Iterator["RunFolder"]:
        """The folder, made if need be, for these tasks under these settings.

        Raises EvalError when it holds a run with other settings, other questions under a task's name, outputs without
        settings, or while another process runs in it.
        """
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path / LOCK_FILE):
            _agree(path, settings, tasks)
            yield cls(path)

    def log(self, task: Task) -> OutputLog:
        """The outputs of a task so far."""
        return OutputLog(self.path / f"{task.name}.jsonl")

    @property
    def speed(self) -> Speed:
        """Of all attempts so far."""
        return read_speed(self.path)

    def add_speed(self, speed: Speed) -> None:
        """Count an attempt."""
        write_file(self.path / SPEED_FILE, json_text(asdict(self.speed + speed)) + "\n")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run's folder, empty when none are recorded. Raises EvalError when they cannot be read."""
    file = path / SETTINGS_FILE
    return read_object(file) if file.exists() else {}


def read_speed(path: Path) -> Speed:
    """How fast a run was; all zero when nothing is recorded."""
    file = path / SPEED_FILE
    try:
        return Speed(**read_object(file)) if file.exists() else Speed()
    except TypeError as error:
        raise EvalError(f"{file}: is no record of a run's speed: {error}") from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What tells two settings apart, one line a key, nested keys with dots."""
    lines = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: the folder has {before!r}, this run asks for {now!r}")
    return lines


def _agree(path: Path, settings: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    given = {task.name: {"questions": len(task.questions), "sha256": task.digest} for task in tasks}
    known = _known_tasks(path, settings)
    for name in known.keys() & given.keys():
        if known[name] != given[name]:
            raise EvalError(f"{path}: task {name} was begun with other questions; choose another folder")
    write_file(path / SETTINGS_FILE, json_text({**settings, "tasks": {**known, **given}}) + "\n")


def _known_tasks(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    old = read_settings(path)
    if not old:
        if any(path.glob("*.jsonl")):
            raise EvalError(f"{path}: holds .jsonl files but no {SETTINGS_FILE}; choose another folder")
        return {}
    tasks: dict[str, Any] = old.pop("tasks", {})
    if lines := differences(old, settings):
        raise EvalError(f"{path}: holds a run with other settings, choose another folder. {'; '.join(lines)}")
    return tasks


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system drops when the process ends, however it ends; no lock where there is no fcntl."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvalError(f"{path.parent}: another run is writing to this folder") from error
        yield
