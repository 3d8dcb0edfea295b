"""A byte-level BPE tokenizer of any size without training data: merges spell out letter sequences in a fixed order."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from colaserve_client.writing import write_file

_SPACE = "Ġ"  # how byte-level BPE writes a space


def write_tokenizer(path: Path, size: int, special_ids: Mapping[str, int]) -> None:
    """Write tokenizer.json with exactly `size` ids: it encodes any text, and every id has a text of its own.

    Ids left over above the merges (between and around the release's special ids) become reserved special tokens.
    """
    write_file(path, json.dumps(_tokenizer(size, special_ids), ensure_ascii=False))


def _tokenizer(size: int, special_ids: Mapping[str, int]) -> dict[str, Any]:
    special = _special_tokens(size, special_ids)
    regular = [i for i in range(size) if i not in special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(regular) >= len(alphabet), "every byte needs an id"
    merges = list(itertools.islice(_merges(), len(regular) - len(alphabet)))
    texts = dict(zip(regular, [*alphabet, *("".join(pair) for pair in merges)], strict=True)) | special
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text) for i, text in sorted(special.items())],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {texts[i]: i for i in range(size)}, "merges": [list(m) for m in merges]},
    }


def _special_tokens(size: int, special_ids: Mapping[str, int]) -> dict[int, str]:
    """Id -> text of the special ids and, when they are at the top of the vocabulary, of those up to its end."""
    special = {i: text for text, i in special_ids.items()}
    lowest = min(special)
    if lowest >= size // 2:
        special |= {i: f"<|reserved_{i}|>" for i in range(lowest, size) if i not in special}
    return special


def _merges() -> Iterator[tuple[str, str]]:
    """(known token, letter) without end, shorter tokens first, words' beginnings before their insides."""
    letters = string.ascii_lowercase
    known = [_SPACE, *letters]
    while True:
        grown = [(left, right) for left in known for right in letters]
        yield from grown
        known = [left + right for left, right in grown]


def _added(id_: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": text, **flags, "special": True}
