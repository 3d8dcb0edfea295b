"""Train a byte-level BPE tokenizer whose special ids are 0 (end of text), 1 (end of turn) and 2 (padding)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from colaserve_client.writing import write_file
from colaserve_services.errors import UsageError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|pad|>")
END_ID, IM_END_ID, PAD_ID = range(3)
# A word with what joins its parts ("Port-au-Prince", "N'Djamena", "D.C"), but without a possessive 's; a number; other
# signs; white space. One space belongs to what follows it.
PIECE = r"'s\b| ?\p{L}+(?:['\-.](?!s\b)\p{L}+)*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMALLEST = len(SPECIAL_TOKENS) + 256  # the special tokens and one token a byte


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries that can encode any text; the same texts give the same bytes.

    Raises UsageError when `vocab_size` is too small for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST:
        raise UsageError(f"vocab_size: got {vocab_size}, expected at least {SMALLEST} (256 bytes and 3 specials)")
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write tokenizer.json into `folder` (made if missing) and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    write_file(path, tokenizer.to_str(pretty=False))
    return path
