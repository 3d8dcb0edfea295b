"""Train a byte-level BPE tokenizer whose special ids are 0 (end of text), 1 (end of turn) and 2 (padding)."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from colaserve_client.writing import write_file
from colaserve_services.errors import UsageError
from colaserve_services.text.tokenizer import SpecialIds

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|pad|>")
END_ID, IM_END_ID, PAD_ID = range(3)
OWN_IDS = SpecialIds(PAD_ID, END_ID, IM_END_ID)
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
    """Write tokenizer.json and tokenizer_config.json into `folder` (made if missing); return the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    write_file(path, tokenizer.to_str(pretty=False))
    write_tokenizer_config(tokenizer, folder)
    return path


def write_tokenizer_config(tokenizer: Tokenizer, folder: Path, special: SpecialIds = OWN_IDS) -> None:
    """Write tokenizer_config.json, which the AutoTokenizer of transformers reads beside tokenizer.json."""
    ids = {"eos_token": special.end_of_text, "pad_token": special.pad}
    tokens = {name: tokenizer.id_to_token(id_) for name, id_ in ids.items() if id_ is not None}
    content = {"clean_up_tokenization_spaces": False, **tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_file(folder / "tokenizer_config.json", json.dumps(content, indent=2) + "\n")
