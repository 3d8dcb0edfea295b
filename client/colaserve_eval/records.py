"""The jsonl files of an evaluation, one record a line: a question and, once it was asked, its answer; and the folder of
a run: a file of outputs a task, the settings they were made with, and how long it took.

A folder holds the outputs of one setting only: continuing with another is refused, naming the difference. Every output
is appended as soon as it is there, in one write, so that an interrupted run loses only the questions in flight.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from colaserve_client.errors import ColaserveError
from colaserve_client.reading import Unreadable, read_json, read_json_lines
from colaserve_client.writing import named, write_file

Json = Mapping[str, Any]
MAX_CHOICES = len(ascii_uppercase)
SETTINGS_FILE, SPEED_FILE, LOCK_FILE = "settings.json", "speed.json", ".lock"


class EvalError(ColaserveError):
    """Something the caller can mend: a file, a setting, a missing part. The message says what was expected."""


@dataclass(frozen=True)
class Record:
    """A question and, once it was asked, what the model answered."""

    id: int | str  # unique within its file
    prompt: str  # whole, few-shot part included
    ground_truth: str
    choices: tuple[str, ...] = ()  # in the order of their letters; empty where the task has none
    rule: str | None = None  # how an answer is judged, a name of `scoring.RULES`; None: by the task's own rule
    generate: str = ""  # the model's text, not cut; empty before the question is asked and when that failed
    finish_reason: str | None = None  # "stop" or "length"; None when it failed or was not recorded
    usage: Json | None = None  # as Usage has it
    error: str | None = None  # why there is no text; such an answer counts as wrong and is asked again by the next run

    def question(self) -> dict[str, Any]:
        """The question's fields; `choices` and `rule` only where they are set."""
        line: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "ground_truth": self.ground_truth}
        choices = {"choices": list(self.choices)} if self.choices else {}
        return {**line, **choices, **({"rule": self.rule} if self.rule else {})}

    def to_json(self) -> dict[str, Any]:
        """The object of a line of outputs: the question's fields and the answer's."""
        answer = {"generate": self.generate, "finish_reason": self.finish_reason, "usage": self.usage}
        return {**self.question(), **answer, "error": self.error}


def parse_question(fields: Json) -> Record:
    """The question of a JSON object, not asked yet. Raises ValueError naming the field that is missing or wrong."""
    choices = fields.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices: expected a list of strings, got {choices!r}")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"choices: {len(choices)} of them, at most {MAX_CHOICES} have a letter")
    rule = _text(fields, "rule") if fields.get("rule") is not None else None
    return Record(
        parse_id(fields.get("id")), _text(fields, "prompt"), _text(fields, "ground_truth"), tuple(choices), rule
    )


def parse_output(fields: Json) -> Record:
    """A question with its answer; finish_reason, usage and error may be missing. Raises ValueError as above."""
    error = fields.get("error")
    return replace(
        parse_question(fields),
        generate=_text(fields, "generate"),
        finish_reason=fields.get("finish_reason"),
        usage=fields.get("usage"),
        error=None if error is None else str(error),
    )


def parse_id(value: Any) -> int | str:
    """The id of a question. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"id: expected a number or a string, got {value!r}")
    return value


def read_records(path: Path, parse: Callable[[Json], Record] = parse_question) -> list[Record]:
    """The records of a jsonl file, at least one, with ids of their own. Raises EvalError naming file and line."""
    records = parse_lines(path, parse)
    seen: set[int | str] = set()
    for record in records:
        if record.id in seen:
            raise EvalError(f"{path}: id {record.id!r} occurs twice; ids must be unique within a file")
        seen.add(record.id)
    if not records:
        raise EvalError(f"{path}: holds no lines")
    return records


def parse_lines(path: Path, parse: Callable[[Json], Any]) -> list[Any]:
    """What `parse` makes of each line that is not empty. Raises EvalError naming file and line."""
    parsed = []
    with readable():
        for number, fields in read_json_lines(path):
            try:
                parsed.append(parse(fields))
            except ValueError as error:
                raise EvalError(f"{path}:{number}: {error}") from error
    return parsed


@contextmanager
def readable() -> Iterator[None]:
    """What cannot be read is an EvalError."""
    try:
        yield
    except Unreadable as error:
        raise EvalError(str(error)) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises EvalError when there is none."""
    with readable():
        return read_json(path)


def write_object(path: Path, value: Json) -> None:
    """Write JSON for people and machines, indented."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_outputs(path: Path, outputs: Iterable[Record]) -> None:
    """Replace a file by these outputs, whole or not at all."""
    write_file(path, "".join(encode_line(output.to_json()) for output in outputs))


def encode_line(fields: Json) -> str:
    """A JSON object as one line, newline included."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _text(fields: Json, name: str) -> str:
    if name not in fields:
        raise ValueError(f"{name}: missing; the line has {', '.join(fields) or 'no fields'}")
    if not isinstance(fields[name], str):
        raise ValueError(f"{name}: expected a string, got {fields[name]!r}")
    return str(fields[name])


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
