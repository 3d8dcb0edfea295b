"""From raw records of a data set to questions, by a template file (TOML).

Keys of a template:
- `prompt`: the form of a question, with places such as {question}; {options} stands for the lettered choices.
- `answer`: [" {ground_truth}"] what follows the form in a few-shot example.
- `separator`: [two newlines] what stands between examples, and between the last one and the question.
- `header`: [""] what the prompt begins with.
- `option`: ["({letter}) {choice}"] one line of {options}.
- `truth`: ["text"] how the ground truth is given: "text"; "letter" (A is the first choice); "index" (0 is the first);
  "number" (1 is the first); "last_word" (of the text named, which then loses it: word prediction).
- `[fields]`: where a place is found in a raw record: a key, with dots into nested objects and lists ("answers.text.0"),
  or a list of keys, joined by a space (for `choices`: a choice each). A place not named here is its own key.
- `[[examples]]`: few-shot examples; each gives the places by name, `choices` as a list, `ground_truth` as text.
Literal braces in a form are doubled. `id` is the record's `id` unless `[fields]` says otherwise; records without one
are numbered from 0.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from colaserve_client.reading import Unreadable, read_text
from colaserve_eval.records import MAX_CHOICES, EvalError, Question, parse_lines, unique

TRUTHS = ("text", "letter", "index", "number", "last_word")
_OWN_PLACES = frozenset({"options", "ground_truth", "choices", "id"})


@dataclass(frozen=True)
class Template:
    """A parsed template file; the module's docstring says what each key means."""

    prompt: str
    answer: str = " {ground_truth}"
    separator: str = "\n\n"
    header: str = ""
    option: str = "({letter}) {choice}"
    truth: str = "text"
    fields: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()

    def question(self, record: Mapping[str, Any], number: int) -> Question:
        """The question of a raw record, the `number`th of its file. Raises ValueError naming the missing key."""
        places = {name: self._find(record, name) for name in _places(self.prompt) - _OWN_PLACES}
        choices = self._choices(record)
        truth = self._truth(record, places, choices)
        prompt = self.header + self._shots() + self._form(places, choices)
        return Question(self._id(record, number), prompt, truth, choices)

    def _shots(self) -> str:
        return "".join(self._shot(example) + self.separator for example in self.examples)

    def _shot(self, example: Mapping[str, Any]) -> str:
        form = self._form(example, example.get("choices", ()))
        return form + self.answer.format(**example)

    def _form(self, places: Mapping[str, Any], choices: Sequence[str]) -> str:
        lettered = zip(ascii_uppercase, choices, strict=False)
        options = "\n".join(self.option.format(letter=letter, choice=choice) for letter, choice in lettered)
        return self.prompt.format(**{**places, "options": options})

    def _find(self, record: Mapping[str, Any], place: str) -> str:
        keys = self.fields.get(place, place)
        parts = [_lookup(record, key) for key in ([keys] if isinstance(keys, str) else keys)]
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, str | int | float):
                raise ValueError(f"{place}: expected text at {keys!r}, got {part!r}")
        return " ".join(str(part) for part in parts)

    def _choices(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        if "options" not in _places(self.prompt):
            return ()
        keys = self.fields.get("choices", "choices")
        found = _lookup(record, keys) if isinstance(keys, str) else [_lookup(record, key) for key in keys]
        if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
            raise ValueError(f"choices: expected a list of texts at {keys!r}, got {found!r}")
        if not 0 < len(found) <= MAX_CHOICES:
            raise ValueError(f"choices: expected 1 to {MAX_CHOICES}, got {len(found)}")
        return tuple(found)

    def _truth(self, record: Mapping[str, Any], places: dict[str, str], choices: Sequence[str]) -> str:
        given = self._find(record, "ground_truth")
        if self.truth == "text":
            return given
        if self.truth == "last_word":
            return _take_last_word(given, places)
        index = _choice_index(given, self.truth)
        if not 0 <= index < len(choices):
            raise ValueError(f"ground_truth: {given!r} as {self.truth} names none of the {len(choices)} choices")
        return choices[index]

    def _id(self, record: Mapping[str, Any], number: int) -> int | str:
        if "id" not in self.fields and "id" not in record:
            return number
        found = _lookup(record, str(self.fields.get("id", "id")))
        if isinstance(found, bool) or not isinstance(found, int | str):
            raise ValueError(f"id: expected a number or a string, got {found!r}")
        return found


def shipped_templates() -> list[str]:
    """Names of the templates that come with the package: the eight published tasks."""
    folder = resources.files(__package__).joinpath("forms")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_template(name_or_path: str) -> Template:
    """A shipped template by name, or a template file. Raises EvalError naming the key that is wrong."""
    if name_or_path in shipped_templates():
        text = resources.files(__package__).joinpath("forms", f"{name_or_path}.toml").read_text(encoding="utf-8")
    else:
        text = _read_file(Path(name_or_path))
    try:
        return _checked(tomllib.loads(text))
    except RecursionError:
        raise EvalError(f"template {name_or_path}: is nested too deep") from None
    except ValueError as error:  # of which TOMLDecodeError is one
        raise EvalError(f"template {name_or_path}: {error}") from error


def read_raw_questions(path: Path, template: Template) -> list[Question]:
    """The questions of a jsonl file of raw records. Raises EvalError naming file and line."""
    numbers = iter(range(2**63))
    return unique([q for _, q in parse_lines(path, lambda record: template.question(record, next(numbers)))], path)


def _read_file(path: Path) -> str:
    try:
        return read_text(path)
    except Unreadable as error:
        shipped = ", ".join(shipped_templates())
        raise EvalError(f"template {path}: neither a readable UTF-8 file ({error}) nor one of {shipped}") from error


def _checked(keys: dict[str, Any]) -> Template:
    if unknown := keys.keys() - {key.name for key in fields(Template)}:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    if "prompt" not in keys:
        raise ValueError("`prompt` is missing")
    for name in ("prompt", "answer", "separator", "header", "option", "truth"):
        if not isinstance(keys.get(name, ""), str):
            raise ValueError(f"{name}: expected a string, got {keys[name]!r}")
    _check_tables(keys.get("fields", {}), keys.get("examples", []))
    template = Template(**keys)
    if template.truth not in TRUTHS:
        raise ValueError(f"truth: expected one of {', '.join(TRUTHS)}, got {template.truth!r}")
    _check_examples(template)
    return template


def _check_tables(places: Any, examples: Any) -> None:
    if not isinstance(places, dict):
        raise ValueError(f"fields: expected a table, got {places!r}")
    for name, keys in places.items():
        if not isinstance(keys, str) and not _are_texts(keys):
            raise ValueError(f"fields.{name}: expected a key or a list of keys, got {keys!r}")
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise ValueError(f"examples: expected tables, [[examples]], got {examples!r}")
    for number, example in enumerate(examples, start=1):
        for name, value in example.items():
            if not (_are_texts(value) if name == "choices" else isinstance(value, str | int | float)):
                raise ValueError(f"example {number}: {name}: expected text (choices: a list of texts), got {value!r}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_examples(template: Template) -> None:
    needed = (_places(template.prompt) | _places(template.answer)) - {"options"}
    _places(template.option)
    for number, example in enumerate(template.examples, start=1):
        if missing := needed - example.keys():
            raise ValueError(f"example {number}: {sorted(missing)[0]!r} is missing")


def _places(form: str) -> set[str]:
    """The names in braces. Raises ValueError for anything but plain names: a form reads values, it runs nothing."""
    places = {name for _, name, _, _ in Formatter().parse(form) if name is not None}
    for name in places:
        if not name.isidentifier():
            raise ValueError(f"{{{name}}} is no plain name; write literal braces as {{{{ and }}}}")
    return places


def _lookup(record: Any, key: str) -> Any:
    found = record
    for part in key.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"the record has no {key!r}; it has {', '.join(record)}") from None
    return found


def _choice_index(given: str, truth: str) -> int:
    if truth == "letter":
        return ascii_uppercase.find(given.strip().upper()) if len(given.strip()) == 1 else -1
    return int(given) - (truth == "number")


def _take_last_word(text: str, places: dict[str, str]) -> str:
    rest, _, word = text.rstrip().rpartition(" ")
    for name, value in places.items():
        if value == text:
            places[name] = rest
    return word
