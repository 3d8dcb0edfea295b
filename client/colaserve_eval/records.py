"""The jsonl files of an evaluation: questions in, outputs out, one JSON object a line."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from colaserve_client.errors import ColaserveError
from colaserve_client.reading import Unreadable, read_json, read_json_lines
from colaserve_client.writing import write_file

QuestionId = int | str
Json = Mapping[str, Any]
MAX_CHOICES = len(ascii_uppercase)


class EvalError(ColaserveError):
    """Something the caller can mend: a file, a setting, a missing part. The message says what was expected."""


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked."""

    id: QuestionId  # unique within its file
    prompt: str  # whole, few-shot part included
    ground_truth: str
    choices: tuple[str, ...] = ()  # in the order of their letters; empty where the task has none
    rule: str | None = None  # how an answer is judged, a name of `tasks.RULES`; None: by the task's own rule

    def to_json(self) -> dict[str, Any]:
        """The object of a line; `choices` and `rule` only where they are set."""
        line: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "ground_truth": self.ground_truth}
        choices = {"choices": list(self.choices)} if self.choices else {}
        return {**line, **choices, **({"rule": self.rule} if self.rule else {})}


@dataclass(frozen=True)
class Output:
    """A question and what came of it."""

    question: Question
    generate: str  # the model's text, not cut; empty when it failed
    finish_reason: str | None = None  # "stop" or "length"; None when it failed or was not recorded
    usage: Json | None = None  # prompt_tokens, completion_tokens, blocks, wasted_blocks
    error: str | None = None  # why there is no text; such an output counts as wrong and is asked again by the next run

    @property
    def id(self) -> QuestionId:
        """The question's."""
        return self.question.id

    def to_json(self) -> dict[str, Any]:
        """The object of a line: the question's fields and the output's."""
        fields = {"generate": self.generate, "finish_reason": self.finish_reason, "usage": self.usage}
        return {**self.question.to_json(), **fields, "error": self.error}


def parse_question(fields: Json) -> Question:
    """The question of a JSON object.

    Raises ValueError naming the field that is missing or of another type.
    """
    choices = tuple(_texts(fields.get("choices") or [], "choices"))
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"choices: {len(choices)} of them, at most {MAX_CHOICES} have a letter")
    rule = _text(fields, "rule") if fields.get("rule") is not None else None
    return Question(_id(fields), _text(fields, "prompt"), _text(fields, "ground_truth"), choices, rule)


def parse_output(fields: Json) -> Output:
    """The output of a JSON object; finish_reason, usage and error may be missing.

    Raises ValueError naming the field that is missing or of another type.
    """
    error = fields.get("error")
    return Output(
        question=parse_question(fields),
        generate=_text(fields, "generate"),
        finish_reason=fields.get("finish_reason"),
        usage=fields.get("usage"),
        error=None if error is None else str(error),
    )


def read_questions(path: Path) -> list[Question]:
    """The questions of a jsonl file, ids checked. Raises EvalError naming file and line."""
    return unique([parsed for _, parsed in parse_lines(path, parse_question)], path)


def read_outputs(path: Path) -> list[Output]:
    """The outputs of a jsonl file, ids checked. Raises EvalError naming file and line."""
    outputs = [parsed for _, parsed in parse_lines(path, parse_output)]
    unique([output.question for output in outputs], path)
    return outputs


def parse_lines(path: Path, parse: Callable[[Json], Any]) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed object) of each non-empty line. Raises EvalError naming file and line."""
    with readable():
        for number, fields in read_json_lines(path):
            try:
                yield number, parse(fields)
            except ValueError as error:
                raise EvalError(f"{path}:{number}: {error}") from error


@contextmanager
def readable() -> Iterator[None]:
    """What cannot be read is an EvalError."""
    try:
        yield
    except Unreadable as error:
        raise EvalError(str(error)) from error


def unique(questions: list[Question], path: Path) -> list[Question]:
    """The same questions. Raises EvalError when two share an id or there is none at all."""
    seen: set[QuestionId] = set()
    for question in questions:
        if question.id in seen:
            raise EvalError(f"{path}: id {question.id!r} occurs twice; ids must be unique within a file")
        seen.add(question.id)
    if not questions:
        raise EvalError(f"{path}: holds no lines")
    return questions


def write_outputs(path: Path, outputs: Iterable[Output]) -> None:
    """Replace a file by these outputs, whole or not at all."""
    write_file(path, "".join(encode_line(output.to_json()) for output in outputs))


def encode_line(fields: Json) -> str:
    """A JSON object as one line, newline included."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


def json_text(value: Any) -> str:
    """JSON for people and machines, indented."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises EvalError when there is none."""
    with readable():
        return read_json(path)


def _id(fields: Json) -> QuestionId:
    value = fields.get("id")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"id: expected a number or a string, got {value!r}")
    return value


def _text(fields: Json, name: str) -> str:
    if name not in fields:
        raise ValueError(f"{name}: missing; the line has {', '.join(fields) or 'no fields'}")
    if not isinstance(fields[name], str):
        raise ValueError(f"{name}: expected a string, got {fields[name]!r}")
    return str(fields[name])


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}: expected a list of strings, got {value!r}")
    return value
