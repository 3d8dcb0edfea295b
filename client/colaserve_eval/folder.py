"""The folder of a run: a jsonl file of outputs a task, the settings they were made with, and how long it took.

A folder holds the outputs of one setting only: continuing with another is refused, naming the difference. Every output
is appended as soon as it is there, in one write, so that an interrupted run loses only the questions in flight.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from colaserve_client.writing import named
from colaserve_eval.records import (
    EvalError,
    Record,
    encode_line,
    parse_output,
    read_object,
    read_records,
    write_object,
    write_outputs,
)

SETTINGS_FILE, SPEED_FILE, LOCK_FILE = "settings.json", "speed.json", ".lock"


@dataclass(frozen=True)
class Task:
    """The questions of one file."""

    name: str  # the outputs' file name without .jsonl; decides the scoring rule
    questions: Sequence[Record]

    def about(self) -> dict[str, Any]:
        """What identifies it in the settings of a run: another template or another order is another task."""
        lines = "".join(encode_line(question.question()) for question in self.questions)
        return {"questions": len(self.questions), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


@dataclass(frozen=True)
class Speed:
    """What was asked and how long it took, summed over the attempts of a run that were not killed."""

    seconds: float = 0.0  # wall clock
    completion_tokens: int = 0
    answers: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second of wall clock; 0 when nothing was measured."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class RunFolder:
    """One run's folder. Use `opened`, which checks the settings and keeps other runs out."""

    def __init__(self, path: Path, tasks: Sequence[Task]):
        self.path, self.tasks = path, tasks
        self._outputs = {task.name: _kept(self.file(task)) for task in tasks}

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
            yield cls(path, tasks)

    def file(self, task: Task) -> Path:
        """Where a task's outputs are."""
        return self.path / f"{task.name}.jsonl"

    def missing(self) -> list[tuple[Task, int, Record]]:
        """The questions without an output, in order, each with its position in its task."""
        return [
            (task, position, question)
            for task in self.tasks
            for position, question in enumerate(task.questions)
            if question.id not in self._outputs[task.name]
        ]

    def append(self, task: Task, output: Record) -> None:
        """Add an output; the line is with the system when this returns."""
        assert output.id not in self._outputs[task.name], f"{output.id!r} has an output already"
        self._outputs[task.name][output.id] = output
        with named(self.file(task)), open(self.file(task), "ab") as file:
            file.write(encode_line(output.to_json()).encode())

    def sort(self) -> None:
        """Put every file into the order of its questions."""
        for task in self.tasks:
            outputs = self._outputs[task.name]
            if found := [outputs[question.id] for question in task.questions if question.id in outputs]:
                write_outputs(self.file(task), found)

    def add_speed(self, speed: Speed) -> None:
        """Count an attempt."""
        before, now = asdict(read_speed(self.path)), asdict(speed)
        write_object(self.path / SPEED_FILE, {name: before[name] + now[name] for name in now})


def read_outputs(folder: Path) -> dict[str, list[Record]]:
    """The outputs of every `<task>.jsonl` of a folder, by the task's name. Raises EvalError when there is none."""
    if not folder.is_dir():
        raise EvalError(f"{folder}: is no folder; expected one with a <task>.jsonl for each task")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise EvalError(f"{folder}: holds no .jsonl file; `eval run --output {folder}` writes one for each task")
    return {file.stem: read_records(file, parse_output) for file in files}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run's folder, empty when none are recorded. Raises EvalError when they cannot be read."""
    file = path / SETTINGS_FILE
    return read_object(file) if file.exists() else {}


def read_speed(path: Path) -> Speed:
    """How fast a run was; all zero when nothing is recorded."""
    file = path / SPEED_FILE
    found = read_object(file) if file.exists() else {}
    return Speed(**{each.name: found.get(each.name, 0) for each in fields(Speed)})


def _kept(path: Path) -> dict[int | str, Record]:
    """The outputs of an earlier attempt. A torn last line and outputs that failed are dropped, to be asked again."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    if not path.exists() or not path.stat().st_size:
        return {}
    found = read_records(path, parse_output)
    kept = {output.id: output for output in found if output.error is None}
    if len(kept) < len(found):
        write_outputs(path, kept.values())
    return kept


def _agree(path: Path, settings: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Record the settings and tasks, or refuse those that are not the folder's."""
    old = read_settings(path)
    if not old and any(path.glob("*.jsonl")):
        raise EvalError(f"{path}: holds .jsonl files but no {SETTINGS_FILE}; choose another folder")
    known, given = old.get("tasks", {}), {task.name: task.about() for task in tasks}
    before, now = _flat({**old, "tasks": None}), _flat({**settings, "tasks": None})
    if old and before != now:
        lines = [
            f"{key}: the folder has {before.get(key)!r}, this run asks for {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        raise EvalError(f"{path}: holds a run with other settings, choose another folder. {'; '.join(lines)}")
    for name in known.keys() & given.keys():
        if known[name] != given[name]:
            raise EvalError(f"{path}: task {name} was begun with other questions; choose another folder")
    write_object(path / SETTINGS_FILE, {**settings, "tasks": {**known, **given}})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
