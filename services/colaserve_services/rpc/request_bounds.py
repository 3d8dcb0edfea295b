"""How large a request of each method may be. Checked on the raw bytes, before protobuf makes objects of them."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor

from colaserve_services.errors import InvalidRequest

KIB, MIB = 1024, 1024 * 1024
MOST_BYTES: Final = 16 * MIB  # of any message; gRPC itself refuses more

_TEXT: Final = 4 * MIB
_BESIDE_LATENTS: Final = MIB  # for all fields beside the latents
_INFER: Final = ("ModelInfer", "ModelStreamInfer")
_TEXT_OR_LATENTS: Final = (*_INFER, "Logprobs", "Score")
_LATENTS: Final = {  # its contexts; of a fork those of the branches too
    "Sample": 1, "Decode": 1, "DecodeLatents": 1, "SampleLatents": 1, "Interpolate": 2, "Fork": 16,
}  # fmt: skip
_ASKED: Final = ("GetInfo", "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
_OTHERS: Final = {**dict.fromkeys(_ASKED, KIB), "Encode": 8 * MIB}

_FIELDS: Final = 16_384  # of a message and those in it; a packed list counts as one. Each may take 100 bytes of memory
_FEWER_FIELDS: Final = dict.fromkeys(("Encode", "EncodeText", "Reconstruct", "Embed", *_INFER), 1000)


class RequestBounds:
    """`context_bytes`: what the latents of the longest context take as float32."""

    def __init__(self, context_bytes: int = MOST_BYTES):
        self.context_bytes = context_bytes

    def check(self, method: str, received: bytes, kind: Descriptor) -> None:
        """Raise InvalidRequest for a message that is too long, or has too many fields, for a request of `method`, whose
        messages are of this kind."""
        most = self.most_bytes(method)
        if len(received) > most:
            raise InvalidRequest("request", f"got {len(received)} bytes, expected at most {most} for {method}")
        fields = _FEWER_FIELDS.get(method, _FIELDS)
        if _left(received, 0, len(received), _messages(kind), fields) < 0:
            raise InvalidRequest("request", f"got more than {fields} fields, the most that {method} takes")

    def most_bytes(self, method: str) -> int:
        """Of one request message."""
        if method in _TEXT_OR_LATENTS:
            return min(max(_TEXT, self.context_bytes + _BESIDE_LATENTS), MOST_BYTES)
        contexts = _LATENTS.get(method)
        bound = _OTHERS.get(method, _TEXT) if contexts is None else contexts * self.context_bytes + _BESIDE_LATENTS
        return min(bound, MOST_BYTES)


@cache
def _messages(kind: Any) -> Mapping[int, Descriptor]:
    """The kinds of the messages in one of this kind, by the number of their field."""
    return {field.number: field.message_type for field in kind.fields if field.message_type is not None}


def _left(message: bytes, position: int, end: int, within: Mapping[int, Descriptor], most: int) -> int:
    """How many of `most` fields are left behind those that lie there; -1 once there are more. Bytes that are no message
    end it: protobuf refuses them."""
    while position < end and most >= 0:
        most -= 1
        tag, position = _varint(message, position)
        if tag & 7 == 2:  # a length, then so many bytes
            length, position = _varint(message, position)
            if kind := within.get(tag >> 3):
                most = _left(message, position, min(position + length, end), _messages(kind), most)
            position += length
        elif tag & 7 == 0:
            _, position = _varint(message, position)
        else:
            position += {1: 8, 5: 4}.get(tag & 7, 0)
    return most


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number there and the position behind it; behind the message's end where there is none."""
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    return 0, len(message)
