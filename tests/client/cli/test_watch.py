"""`colaserve generate --watch` on a pseudo-terminal: what a person would see on it."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from unicodedata import combining, east_asian_width

import pytest

from tests.client.behaviour import invalid
from tests.client.cli.conftest import Run
from tests.client.fakes import STORY, FakeServer
from tests.waiting import wait_until as eventually

TOKEN = re.compile(r"\x1b\[(\d*)([A-Zm])|\x1b\[2?2?m|\r(?=\n)|(.)", re.DOTALL)


class Terminal:
    """The rows of text that a terminal of this width shows, and what it showed each time a text was taken back."""

    def __init__(self, width: int):
        self.width, self.rows, self.row, self.column = width, [[]], 0, 0
        self.seen: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows)

    def feed(self, output: str) -> None:
        for count, command, character in (match.groups() for match in TOKEN.finditer(output)):
            if command == "A":
                self.row -= int(count)
            elif command == "C":
                self.column = min(self.column + int(count), self.width - 1)
            elif command == "J":
                del self.rows[self.row + 1 :], self.rows[self.row][self.column :]
            elif character == "\r":
                self.seen.append(self.text)
                self.column = 0
            elif character == "\n":
                self.next_row()
            elif character:
                self.put(character)

    def next_row(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.rows += [[] for _ in range(self.row + 1 - len(self.rows))]

    def put(self, character: str) -> None:
        cells = 0 if combining(character) else 2 if east_asian_width(character) in "WF" else 1
        if self.column + cells > self.width:
            self.next_row()
        row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        if cells:
            row[self.column : self.column + cells] = [character, *[""] * (cells - 1)]
            self.column += cells
        else:
            row[self.column - 1] += character


@contextmanager
def on_a_terminal(server: FakeServer, width: int, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A running `colaserve generate` and the other end of its terminal, three rows high."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 3, width, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "colaserve_client", "generate", "--target", server.target, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=known)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read(ours: int, until: str = "") -> str:
    """What was written to a terminal: all, or up to and with a text."""
    written = b""
    try:
        while not until or until.encode() not in written:
            written += os.read(ours, 4096)
    except OSError:  # the other end is closed
        pass
    return written.decode()


def wrapped(text: str, width: int) -> str:
    return "\n".join(text[start : start + width].rstrip() for start in range(0, len(text), width))


def test_the_block_under_way_is_shown_behind_the_text_and_replaced_by_what_it_becomes(server: FakeServer) -> None:
    width = 8  # of two blocks
    with on_a_terminal(server, width, "Once", "--watch", "--preview-every", "2") as (process, ours):
        terminal = Terminal(width)
        terminal.feed(read(ours))
        assert process.wait(30) == 0
    story = STORY.decode()
    blocks = [story[start : start + 4] for start in range(0, len(story), 4)]
    looks = ["".join(blocks[:i]) + block[:2] + "??" for i, block in enumerate(blocks)]
    assert terminal.seen == [wrapped(look, width) for look in looks]
    assert terminal.text.removesuffix("\n") == wrapped(story, width)


def test_a_prompt_of_wide_characters_is_left_as_it_is(server: FakeServer) -> None:
    prompt = "日本e\u0301" * 9  # more than the terminal has rows for
    with on_a_terminal(server, 9, prompt, "--watch", "--echo") as (process, ours):
        terminal = Terminal(9)
        terminal.feed(read(ours))
        assert process.wait(30) == 0
    assert "".join(terminal.text.split()) == prompt + STORY.decode().replace(" ", "")
    assert len(terminal.seen) == 3 * 7


def test_ctrl_c_takes_back_what_was_not_certain(server: FakeServer) -> None:
    server.behaviour.wait_after = 5  # the first block, and a preview of the second
    with on_a_terminal(server, 80, "Once", "--watch") as (process, ours):
        written = read(ours, until="r???")
        process.send_signal(signal.SIGINT)
        terminal = Terminal(80)
        terminal.feed(written + read(ours))
        assert process.wait(30) == 130
    assert terminal.text == " the\n"
    eventually(lambda: server.behaviour.running == 0)


def test_an_error_within_the_text_has_a_line_of_its_own(server: FakeServer) -> None:
    server.behaviour.fail_after = {1: invalid("prompt", "cannot go on")}
    with on_a_terminal(server, 80, "Once") as (process, ours):
        terminal = Terminal(80)
        terminal.feed(read(ours))
        assert process.wait(30) == 2
    assert terminal.text.split("\n")[:2] == [" the", "colaserve: prompt: cannot go on"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--watch"], "--watch draws on a terminal"),
        (["--watch", "--json"], "--watch draws on a terminal: it goes without --json"),
        (["--preview-every", "2"], "previews are seen with --json or --watch only"),
        (["--probes"], "--probes are seen with --json only"),
        (["--json", "--preview-every", "1001"], "--preview-every: got 1001, expected 0 to 1000"),
    ],
)
def test_what_would_not_be_seen_is_refused(run: Run, options: list[str], fault: str) -> None:
    ran = run("generate", "Once", *options)
    assert (ran.code, ran.out) == (2, "")
    assert fault in ran.err


def test_json_has_previews_and_probes(run: Run) -> None:
    found = run("generate", "Once", "--json", "--preview-every", "2", "--probes").json
    assert found["previews"][0] == {"index": 0, "step": 2, "text": " t??", "latents": None}
    assert (len(found["previews"]), len(found["probes"]), found["probes"][0]["norm"]) == (7, 7, 1.5)
