"""A client in a process that was forked from the one that made it."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.client.fakes import FakeServer

PROGRAM = """
import asyncio, faulthandler, json, os, sys
from colaserve_client import *

faulthandler.dump_traceback_later(25, exit=True)
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


def test_a_client_used_before_a_fork_works_on_both_sides(server: FakeServer) -> None:
    said = lines_of("text(client); in_child(lambda: text(client)); say(parent=text(client))", server.target)
    assert said == [{"child": " the"}, {"parent": " the"}]


def test_a_grandchild_can_use_it_too(server: FakeServer) -> None:
    program = "text(client); in_child(lambda: (text(client), in_child(lambda: text(client)))[0])"
    assert lines_of(program, server.target) == [{"child": " the"}, {"child": " the"}]


def test_a_pool_of_forked_processes_shares_a_client(server: FakeServer) -> None:
    program = """
import multiprocessing
text(client)
with multiprocessing.get_context("fork").Pool(2) as pool:
    say(texts=pool.map(lambda_, range(4)))
"""
    program = "def lambda_(number):\n    return client.tokenize(str(number)).texts[0]\n" + program
    assert lines_of(program, server.target) == [{"texts": ["0", "1", "2", "3"]}]


ASYNCIO = """
shared = AsyncClient(target, timeout=5)
async def once(client):
    return (await client.generate("x", max_new_tokens=4)).text
async def once_and_close():
    async with AsyncClient(target, timeout=5) as client:
        return await once(client)
"""


@pytest.mark.parametrize("used", ["shared", "AsyncClient(target)"])
def test_asyncio_clients_say_what_to_do_in_a_child_of_a_process_with_a_connected_one(
    server: FakeServer, used: str
) -> None:
    program = f"asyncio.run(once(shared)); in_child(lambda: asyncio.run(once({used}))); in_child(lambda: text(client))"
    refused, blocking = lines_of(ASYNCIO + program, server.target)
    assert refused["child"] == "Unavailable"
    assert "close them before the fork" in refused["message"]
    assert blocking == {"child": " the"}


def test_asyncio_clients_work_in_a_child_when_the_parents_were_closed_or_never_used(server: FakeServer) -> None:
    program = "asyncio.run(once_and_close()); in_child(lambda: asyncio.run(once(shared)))"
    assert lines_of(ASYNCIO + program, server.target) == [{"child": " the"}]


def test_a_stream_that_was_open_before_a_fork_stays_the_parents(server: FakeServer) -> None:
    program = """
stream = client.stream("x", max_new_tokens=8)
next(stream)
in_child(lambda: next(stream).text)
in_child(lambda: stream.close())
say(parent=[chunk.text for chunk in stream])
"""
    refused, closed, parent = lines_of(program, server.target)
    assert refused["child"] == "Cancelled"
    assert "opened before this process was forked" in refused["message"]
    assert closed == {"child": None}
    assert parent == {"parent": ["re w"]}


def test_leaving_a_clients_with_block_in_a_child_leaves_the_parent_connected(server: FakeServer) -> None:
    program = "text(client); in_child(lambda: client.close()); say(parent=text(client))"
    assert lines_of(program, server.target) == [{"child": None}, {"parent": " the"}]


@pytest.mark.parametrize("value", ["0", "false"])
def test_where_grpc_does_not_survive_a_fork_the_child_is_told_so_at_once(server: FakeServer, value: str) -> None:
    program = "text(client); in_child(lambda: text(client))"
    [said] = lines_of(program, server.target, GRPC_ENABLE_FORK_SUPPORT=value)
    assert said["child"] == "Unavailable"
    assert "GRPC_ENABLE_FORK_SUPPORT" in said["message"]
