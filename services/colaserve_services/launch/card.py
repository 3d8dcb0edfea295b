"""What a checkpoint's own card says about its model."""

from __future__ import annotations

from pathlib import Path

from colaserve_client.reading import Unreadable, read_text

MOST = 1000  # characters of a description


def description(directory: Path) -> str:
    """What the model can and cannot do: the first paragraph of MODEL_CARD.md; empty where there is none."""
    try:
        text = read_text(directory / "MODEL_CARD.md")
    except Unreadable:  # a card is for people: one that cannot be read stops no server
        return ""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    first = next((part for part in paragraphs if part and not part.startswith("#")), "")
    return first.replace("*", "").replace("`", "")[:MOST]
