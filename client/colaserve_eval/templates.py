"""From raw records of a data set to questions, by a template file (TOML).

Keys of a template:
- `prompt`: the form of a question, with placeholders such as {question}; {options} stands for the lettered choices.
- `answer`: [" {ground_truth}"] what follows the form in a few-shot example.
- `separator`: [two newlines] what stands between examples, and between the last one and the question.
- `header`: [""] what the prompt begins with.
- `option`: ["({letter}) {choice}"] one line of {options}.
- `truth`: ["text"] how the ground truth is given: "text"; "letter" (A is the first choice); "index" (0 is the first);
  "number" (1 is the first); "last_word" (of the text named, which then loses it: word prediction).
- `[fields]`: where a placeholder's text is in a raw record: a key, with dots into nested objects and lists
  ("answers.text.0"), or a list of keys, joined by a space (for `choices`: a choice each). A placeholder not named here
  is its own key.
- `[[examples]]`: few-shot examples; each gives the placeholders by name, `choices` as a list, `ground_truth` as text.
Literal braces in a form are doubled. `id` is the record's `id` unless `[fields]` says otherwise; records without one
are numbered from 0.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from itertools import count
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from colaserve_client.reading import Unreadable, read_text
from colaserve_eval.records import MAX_CHOICES, EvalError, Record, parse_id, read_records

TRUTHS = ("text", "letter", "index", "number", "last_word")
_KINDS = {str: "a string", dict: "a table", list: "tables, [[examples]]"}


@dataclass(frozen=True)
class Template:
    """A parsed template file; the module's docstring says what each key means. Raises ValueError for a wrong one."""

    prompt: str = ""
    answer: str = " {ground_truth}"
    separator: str = "\n\n"
    header: str = ""
    option: str = "({letter}) {choice}"
    truth: str = "text"
    fields: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in fields(self):
            kind = {"fields": dict, "examples": list}.get(key.name, str)
            if not isinstance(value := getattr(self, key.name), kind):
                raise ValueError(f"{key.name}: expected {_KINDS[kind]}, got {value!r}")
        if not self.prompt:
            raise ValueError("`prompt` is missing")
        if self.truth not in TRUTHS:
            raise ValueError(f"truth: expected one of {', '.join(TRUTHS)}, got {self.truth!r}")
        for name, keys in self.fields.items():
            if not isinstance(keys, str) and not _are_texts(keys):
                raise ValueError(f"fields.{name}: expected a key or a list of keys, got {keys!r}")
        needed = (_placeholders(self.prompt) | _placeholders(self.answer)) - {"options"}
        _placeholders(self.option)
        for number, example in enumerate(self.examples, start=1):
            if not isinstance(example, dict):
                raise ValueError(f"examples: expected tables, [[examples]], got {example!r}")
            for name, value in example.items():
                if not (_are_texts(value) if name == "choices" else isinstance(value, str | int | float)):
                    expected = "text (choices: a list of texts)"
                    raise ValueError(f"example {number}: {name}: expected {expected}, got {value!r}")
            if missing := needed - example.keys():
                raise ValueError(f"example {number}: {sorted(missing)[0]!r} is missing")

    def question(self, record: Mapping[str, Any], number: int) -> Record:
        """The question of a raw record, the `number`th of its file. Raises ValueError naming the missing key."""
        names = _placeholders(self.prompt)
        texts = {name: self._find(record, name) for name in names - {"options", "ground_truth", "choices", "id"}}
        choices = self._choices(record) if "options" in names else ()
        truth = self._truth(record, texts, choices)
        shots = "".join(
            self._form(example, example.get("choices", ())) + self.answer.format(**example) + self.separator
            for example in self.examples
        )
        has_id = "id" in self.fields or "id" in record
        id_ = _lookup(record, str(self.fields.get("id", "id"))) if has_id else number
        return Record(parse_id(id_), self.header + shots + self._form(texts, choices), truth, choices)

    def _form(self, texts: Mapping[str, Any], choices: Sequence[str]) -> str:
        lettered = zip(ascii_uppercase, choices, strict=False)
        options = "\n".join(self.option.format(letter=letter, choice=choice) for letter, choice in lettered)
        return self.prompt.format(**{**texts, "options": options})

    def _find(self, record: Mapping[str, Any], name: str) -> str:
        keys = self.fields.get(name, name)
        parts = [_lookup(record, key) for key in ([keys] if isinstance(keys, str) else keys)]
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, str | int | float):
                raise ValueError(f"{name}: expected text at {keys!r}, got {part!r}")
        return " ".join(str(part) for part in parts)

    def _choices(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        keys = self.fields.get("choices", "choices")
        found = _lookup(record, keys) if isinstance(keys, str) else [_lookup(record, key) for key in keys]
        if not _are_texts(found):
            raise ValueError(f"choices: expected a list of texts at {keys!r}, got {found!r}")
        if not 0 < len(found) <= MAX_CHOICES:
            raise ValueError(f"choices: expected 1 to {MAX_CHOICES}, got {len(found)}")
        return tuple(found)

    def _truth(self, record: Mapping[str, Any], texts: dict[str, str], choices: Sequence[str]) -> str:
        """The right answer; a last word is taken out of `texts`."""
        given = self._find(record, "ground_truth")
        if self.truth == "text":
            return given
        if self.truth == "last_word":
            rest, _, word = given.rstrip().rpartition(" ")
            texts |= {name: rest for name, text in texts.items() if text == given}
            return word
        if self.truth == "letter":
            index = ascii_uppercase.find(given.strip().upper()) if len(given.strip()) == 1 else -1
        else:
            index = int(given) - (self.truth == "number")
        if not 0 <= index < len(choices):
            raise ValueError(f"ground_truth: {given!r} as {self.truth} names none of the {len(choices)} choices")
        return choices[index]


def shipped_templates() -> list[str]:
    """Names of the templates that come with the package: the eight published tasks."""
    folder = resources.files(__package__).joinpath("forms")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_template(name_or_path: str) -> Template:
    """A shipped template by name, or a template file. Raises EvalError naming the key that is wrong."""
    shipped = shipped_templates()
    try:
        if name_or_path in shipped:
            text = resources.files(__package__).joinpath("forms", f"{name_or_path}.toml").read_text(encoding="utf-8")
        else:
            text = read_text(name_or_path)
        keys = tomllib.loads(text)
        if unknown := keys.keys() - {key.name for key in fields(Template)}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
        return Template(**keys)
    except Unreadable as error:
        problem = f"neither a readable UTF-8 file ({error}) nor one of {', '.join(shipped)}"
        raise EvalError(f"template {name_or_path}: {problem}") from error
    except RecursionError:
        raise EvalError(f"template {name_or_path}: is nested too deep") from None
    except ValueError as error:  # of which TOMLDecodeError is one
        raise EvalError(f"template {name_or_path}: {error}") from error


def read_raw_questions(path: Path, template: Template) -> list[Record]:
    """The questions of a jsonl file of raw records. Raises EvalError naming file and line."""
    numbers = count()
    return read_records(path, lambda record: template.question(record, next(numbers)))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _placeholders(form: str) -> set[str]:
    """The names in braces. Raises ValueError for anything but plain names: a form reads values, it runs nothing."""
    names = {name for _, name, _, _ in Formatter().parse(form) if name is not None}
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"{{{name}}} is no plain name; write literal braces as {{{{ and }}}}")
    return names


def _lookup(record: Any, key: str) -> Any:
    found = record
    for part in key.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"the record has no {key!r}; it has {', '.join(record)}") from None
    return found
