"""Small tokenizers that are not byte-level."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers


def metaspace() -> tokenizers.Tokenizer:
    """As SentencePiece's: a word carries the space before it, the decoder drops the first one."""
    words = ["▁the", "▁sea", "s", "▁", "<|pad|>", *"tehas"]
    library = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<|pad|>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama's: words with their spaces, and bytes for what no word spells."""
    words = ["<|pad|>", "▁the", "▁sea", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<|pad|>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library
