"""The jsonl files of an evaluation, one record a line: a question and, once it was asked, its answer."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from colaserve_client.errors import ColaserveError
from colaserve_client.reading import Unreadable, read_json, read_json_lines
from colaserve_client.writing import write_file

Json = Mapping[str, Any]
MAX_CHOICES = len(ascii_uppercase)


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
