"""What a body may cost: it is read where one is taken, after the key, bounded, and checked to its first error."""

import asyncio
import json
import threading
from typing import Any

import pytest
from pydantic import BaseModel, field_validator
from starlette.requests import Request

from colaserve_services.gateway.body import MOST_ITEMS, MOST_PARTS, checked_body
from colaserve_services.gateway.dialects.completions import MOST_PROMPTS
from colaserve_services.gateway.dialects.fields import MOST_IDS, MOST_MESSAGES
from colaserve_services.gateway.edge import RequestRecord
from colaserve_services.gateway.settings import Bounds, GatewaySettings
from colaserve_services.rpc.auth import Keys
from tests.services.gateway.fake_generation import SAYS
from tests.services.gateway.running_gateway import CHAT, COMPLETIONS, Running
from tests.waiting import PATIENCE

JSON = {"content-type": "application/json"}
MANY = MOST_ITEMS - 100


def body_of(before: str, item: str, count: int, after: str) -> str:
    return before + ",".join([item] * count) + after


CHATTING, PARTS = '{"messages": [', '{"messages": [{"role": "user", "content": ['


@pytest.mark.parametrize(
    ("path", "before", "item", "count", "after", "param"),
    [  # many wrong items, of which the first ends the check
        (COMPLETIONS, '{"prompt": "x", "stop": [', "0", MANY, "]}", "stop"),
        (COMPLETIONS, '{"prompt": [', "null", MANY, "]}", "prompt"),
        (COMPLETIONS, '{"prompt": [1, "a", ', "-1", MANY, "]}", "prompt"),
        (COMPLETIONS, '{"prompt": "x", "guidance_interval": [', "2", MANY, "]}", "guidance_interval"),
        (CHAT, CHATTING, "0", MANY, "]}", "messages[0]"),
        (CHAT, PARTS, "0", MANY, "]}]}", "messages[0].content[0]"),
        (CHAT, '{"messages": [{"role": "user", "content": "x"}], "tools": [', "0", MANY, "]}", "tools"),
        ("/tokenize", CHATTING, "0", MANY, "]}", "messages[0]"),
        ("/detokenize", '{"tokens": [', '"a"', MANY, "]}", "tokens[0]"),
        # one item too many
        (COMPLETIONS, '{"prompt": "x", "stop": [', '"s"', 4 + 1, "]}", "stop"),
        (COMPLETIONS, '{"prompt": [', '"p"', MOST_PROMPTS + 1, "]}", "prompt"),
        (COMPLETIONS, '{"prompt": [', "[1]", MOST_PROMPTS + 1, "]}", "prompt"),
        (COMPLETIONS, '{"prompt": [', "1", MOST_IDS + 1, "]}", "prompt"),
        (CHAT, CHATTING, '{"role":"user","content":"x"}', MOST_MESSAGES + 1, "]}", "messages"),
        (CHAT, PARTS, '{"type":"text","text":"x"}', MOST_MESSAGES + 1, "]}]}", "messages[0].content"),
        ("/detokenize", '{"tokens": [', "1", MOST_IDS + 1, "]}", "tokens"),
    ],
)
async def test_a_list_is_refused_at_its_first_wrong_item_or_by_its_length(
    gateway: Running, path: str, before: str, item: str, count: int, after: str, param: str
):
    answer = await gateway.http.post(path, content=body_of(before, item, count, after), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("item", ["[]", "{}", '{"a":0}', '"]",[]', '"\\\\",{}'])
async def test_a_body_of_very_many_parts_is_refused_before_it_is_parsed(gateway: Running, item: str):
    content = body_of('{"prompt": "x", "tools": [', item, MOST_PARTS, "]}")
    answer = await gateway.http.post(COMPLETIONS, content=content, headers=JSON)
    assert answer.status_code == 400
    assert f"more than {MOST_PARTS} arrays, objects and keys" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": [1]}\\"' * 20_000, "\\" * 100_000, '"' * 99_999, "é日𝄞:" * 30_000]
)
async def test_what_looks_like_parts_in_a_text_is_text(gateway: Running, text: str):
    for ascii_only in (True, False):
        content = json.dumps({"prompt": text, "max_tokens": 200}, ensure_ascii=ascii_only).encode()
        answer = await gateway.http.post(COMPLETIONS, content=content, headers=JSON)
        assert answer.json()["choices"][0]["text"] == SAYS
        assert gateway.fake.seen[-1].request.prompt == text


async def test_a_byte_order_mark_is_read_past_and_other_encodings_are_refused(gateway: Running):
    content = json.dumps({"prompt": "x"})
    marked = await gateway.http.post(COMPLETIONS, content=content.encode("utf-8-sig"), headers=JSON)
    assert marked.status_code == 200
    for other in ("utf-16", "utf-32"):
        refused = await gateway.http.post(COMPLETIONS, content=content.encode(other), headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_json")


PARSED_IN: list[threading.Thread] = []


class Noted(BaseModel):
    """Notes the thread that it is checked in."""

    text: str

    @field_validator("text")
    @classmethod
    def note(cls, text: str) -> str:
        PARSED_IN.append(threading.current_thread())
        return text


async def test_large_bodies_are_parsed_off_the_event_loop_and_small_ones_on_it():
    for size in (10, 1_000_000):
        message = {"type": "http.request", "body": json.dumps({"text": "x" * size}).encode()}
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")], "state": {}}
        scope["state"]["record"] = RequestRecord("id")
        request = Request(scope, iter_receive(message))
        assert len((await checked_body(request, Noted, Bounds())).text) == size
    small, large = PARSED_IN
    assert small is threading.current_thread()
    assert large is not small


def iter_receive(message: dict[str, Any]) -> Any:
    async def receive() -> dict[str, Any]:
        return message

    return receive


async def first_line(gateway: Running, request: str) -> str:
    """Of the answer to a head whose body never comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.server.port)
    writer.write(f"{request}\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4000000\r\n\r\n".encode())
    line = await asyncio.wait_for(reader.readline(), PATIENCE)
    writer.close()
    return line.decode()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /health HTTP/1.1", 200),
        ("POST /health HTTP/1.1", 405),
        ("POST /metrics HTTP/1.1", 405),
        ("GET /ready HTTP/1.1", 200),
        ("GET /docs HTTP/1.1", 200),
        ("GET /openapi.json HTTP/1.1", 200),
        ("GET /v1/models HTTP/1.1", 200),
        ("DELETE /v1/completions HTTP/1.1", 405),
        ("POST /nowhere HTTP/1.1", 404),
    ],
)
async def test_paths_without_a_body_read_none(gateway: Running, request_line: str, status: int):
    assert f" {status} " in await first_line(gateway, request_line)


async def test_the_key_is_looked_at_before_the_body(start):
    gateway = await start(GatewaySettings(keys=Keys(["right"])))
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/models", "/v1/latents/encode", "/v2", "/nowhere"):
        assert " 401 " in await first_line(gateway, f"POST {path} HTTP/1.1")
