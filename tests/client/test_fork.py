"""A client in a process that was forked from the one that made it: it connects anew, or says at once why it cannot."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.client.fakes import FakeServer

PROGRAM = """
import asyncio, json, os, sys
from colaserve_client import *

target = sys.argv[1]

def say(**fields):
    print(json.dumps(fields), flush=True)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            say(child=work())
        except ColaserveError as error:
            say(child=type(error).__name__, message=str(error))
        except BaseException as error:
            say(child=repr(error))
        os._exit(0)
    os.waitpid(child, 0)

def text(client):
    return client.generate("x", max_new_tokens=4).text

client = Client(target, timeout=5)
shared = AsyncClient(target, timeout=5)
async def once(client):
    return (await client.generate("x", max_new_tokens=4)).text
async def once_and_close():
    async with AsyncClient(target, timeout=5) as client:
        return await once(client)
"""


def lines_of(program: str, target: str, **environment: str) -> list[dict[str, Any]]:
    """What a program that forks says."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, target],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# Of a child that was forked while a stream was open, gRPC 1.85's own threads close the connection, and may crash in it.
UNHARMED = {"GRPC_EXPERIMENTS": "-event_engine_fork"}
USED_BEFORE = {
    "both sides": (
        "text(client); in_child(lambda: text(client)); in_child(lambda: client.close()); say(parent=text(client))",
        [{"child": " the"}, {"child": None}, {"parent": " the"}],
    ),
    "a grandchild": (
        "text(client); in_child(lambda: (text(client), in_child(lambda: text(client)))[0])",
        [{"child": " the"}] * 2,
    ),
    "closed asyncio clients": (
        "asyncio.run(once_and_close()); in_child(lambda: asyncio.run(once(shared)))",
        [{"child": " the"}],
    ),
    "a pool": (
        """
import multiprocessing
def first_text(number):
    return client.tokenize(str(number)).texts[0]
text(client)
with multiprocessing.get_context("fork").Pool(2) as pool:
    say(texts=pool.map(first_text, range(4)))
""",
        [{"texts": ["0", "1", "2", "3"]}],
    ),
    "errors that were kept": (
        """
kept = [outcome.error for outcome in client.generate_many([GenerationRequest("x", max_new_tokens=0)])]
try:
    client.generate("x", max_new_tokens=0)
except InvalidRequest as error:
    kept.append(error)
in_child(lambda: text(client))
""",
        [{"child": " the"}],
    ),
}


@pytest.mark.parametrize("case", USED_BEFORE)
def test_a_client_that_was_used_before_a_fork_works_after_it(server: FakeServer, case: str) -> None:
    program, said = USED_BEFORE[case]
    assert lines_of(program, server.target) == said


@pytest.mark.parametrize("used", ["once(shared)", "once(AsyncClient(target))", "asyncio.to_thread(text, client)"])
def test_the_child_of_a_process_with_a_connected_asyncio_client_is_refused_at_once(server, used):
    program = f"asyncio.run(once(shared)); in_child(lambda: asyncio.run({used}))"
    [said] = lines_of(program, server.target)
    assert said["child"] == "Unavailable"
    assert "close asyncio clients before the fork" in said["message"]


def test_a_stream_that_is_open_at_a_fork_stays_the_parents(server: FakeServer) -> None:
    program = """
stream = client.stream("x", max_new_tokens=8)
next(stream)
in_child(lambda: next(stream).text)
in_child(lambda: text(Client(target)))
in_child(lambda: stream.close())
in_child(lambda: client.close())
say(parent=[chunk.text for chunk in stream])
in_child(lambda: text(client))
"""
    *refused, closed, disconnected, parent, later = lines_of(program, server.target, **UNHARMED)
    assert [said["child"] for said in refused] == ["Unavailable"] * 2
    assert "a call was running" in refused[0]["message"]
    assert closed == disconnected == {"child": None}
    assert parent == {"parent": ["re w"]}
    assert later == {"child": " the"}


def test_a_child_that_cannot_make_calls_ends_like_any_other(server: FakeServer) -> None:
    server.behaviour.wait_after = 1
    program = """
stream = client.stream("x", max_new_tokens=8)
next(stream)
statuses = []
while len(statuses) < 5 and (child := os.fork()):
    statuses.append(os.waitpid(child, 0)[1])
if child:
    say(statuses=statuses)
    stream.cancel()
"""
    assert lines_of(program, server.target, **UNHARMED) == [{"statuses": [0] * 5}]


def test_where_grpc_does_not_survive_a_fork_the_child_is_refused_at_once(server: FakeServer) -> None:
    program = "text(client); in_child(lambda: text(client))"
    [said] = lines_of(program, server.target, GRPC_ENABLE_FORK_SUPPORT="false")
    assert said["child"] == "Unavailable"
    assert "GRPC_ENABLE_FORK_SUPPORT" in said["message"]


def test_a_fork_waits_for_the_calls_of_other_threads(server: FakeServer) -> None:
    program = """
import threading
done, failures = threading.Event(), []
def keep_calling():
    while not done.is_set():
        try:
            text(client)
        except ColaserveError as error:
            failures.append(str(error))
callers = [threading.Thread(target=keep_calling) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(3):
    in_child(lambda: text(client))
done.set()
for caller in callers:
    caller.join()
say(failures=failures)
"""
    assert lines_of(program, server.target) == [{"child": " the"}] * 3 + [{"failures": []}]
