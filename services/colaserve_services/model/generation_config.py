"""generation_config.json: a checkpoint's own defaults. The file of --defaults has the same form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from colaserve_client.fields import Field
from colaserve_services.bounds import MAX_NEW_TOKENS, SAMPLER, SAMPLING
from colaserve_services.errors import CheckpointError
from colaserve_services.model.config import DELETE, read_json

REQUESTS: Final[Mapping[str, Field]] = {
    "max_new_tokens": MAX_NEW_TOKENS,
    **{name: found for name, found in {**SAMPLER, **SAMPLING}.items() if name not in ("seed", "steering")},
}
_SPECIAL_IDS: Final = ("pad_token_id", "eos_token_id", "im_end_token_id")
# Names that Hugging Face's own generation_config.json uses, beside ours, and that carry no default of ours.
_IGNORED: Final = {
    "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "max_length", "min_length",
    "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate", "transformers_version",
    "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class GenerationDefaults:
    """What such a file says; None where it says nothing."""

    requests: Mapping[str, Any] = field(default_factory=dict)  # of unset fields of a request, those that it names
    chat_frame: str | None = None  # with "{prompt}" where the message belongs
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None  # each ends a text
    im_end_token_id: int | None = None


def read_generation_config(path: Path, table: Mapping[str, Field] = REQUESTS) -> GenerationDefaults:
    """Read a file. Raises CheckpointError, one line that names the file and the key."""
    found = {key: value for key, value in read_json(path).items() if key not in _IGNORED}
    own, requests = dict[str, Any](), dict[str, Any]()
    for key, value in found.items():
        if key not in (*table, *_SPECIAL_IDS, "chat_frame"):
            raise CheckpointError(f"{path}: unknown key {key!r} (value {value!r}). {DELETE}")
        if value is None:
            continue
        if key in table:
            requests[key] = _request(path, table[key], value)
        elif key == "eos_token_id" and isinstance(value, list):
            own[key] = tuple(_of_kind(path, key, one, int) for one in value) or None
        else:
            own[key] = _of_kind(path, key, value, str if key == "chat_frame" else int)
    if "{prompt}" not in own.get("chat_frame", "{prompt}"):
        raise CheckpointError(f"{path}: chat_frame lacks '{{prompt}}', which stands for the message")
    return GenerationDefaults(requests, **own)


def _request(path: Path, known: Field, value: Any) -> Any:
    value = _of_kind(path, known.name, value, known.kind)
    if fault := known.fault(value):
        raise CheckpointError(f"{path}: {known.name}: {fault}")
    return value


def _of_kind(path: Path, key: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise CheckpointError(f"{path}: {key} is {value!r}; expected {kind.__name__}")
    return value
