"""Text and token ids: the tokenizer, text out of ids as they come, stop strings. No torch, no grpc."""

from colaserve_services.text.detokenizer import Detokenizer, join
from colaserve_services.text.stop_strings import StopStrings
from colaserve_services.text.tokenizer import SpecialIds, Tokenizer

__all__ = ["Detokenizer", "SpecialIds", "StopStrings", "Tokenizer", "join"]
