"""python -m tests.abuse [--server COMMAND]: attacks a real server, each with a well-behaved caller beside it.

Prints a Markdown table. Exit code 1 when a bound does not hold. Needs Linux and about half an hour of a quiet machine.
--server is a command that takes the options of `colaserve up`, such as that of another build.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.abuse import heavy  # noqa: F401 (registers attacks)
from tests.abuse.attacks import short_generations
from tests.abuse.server import OURS, Bystander, Delay, Server
from tests.abuse.target import ATTACKS, MIB, Attack, Target

ANSWERS = 100  # of the bystander, undisturbed and again beside the attack
HALF_SECONDS = 60.0  # that either half takes at most
MOST_MEMORY = 256 * MIB  # above the level after the warm-up and the KV caches of honest sessions
SLACK_SECONDS = 0.15
HEADS = (
    "attack",
    "sent",
    "answers",
    "p99 alone",
    "p99 beside",
    "worst",
    "memory",
    "of it KV",
    "refused how",
    "verdict",
)


@dataclass(frozen=True)
class Row:
    """One attack. Delays in seconds, memory and what was sent in bytes."""

    attack: Attack
    sent: int
    alone: Sequence[Delay]
    beside: Sequence[Delay]
    memory: int
    kv: int  # at most at once
    answers: str
    left_over: str

    def faults(self, timed: bool) -> list[str]:
        """What does not hold."""
        bound = 2 * p99(self.alone) + (0 if self.attack.sessions else SLACK_SECONDS)
        failed = [delay.code for delay in self.beside if delay.code not in ("OK", "unfinished")]
        return [
            *(["bystander delayed"] if timed and p99(self.beside) > bound else []),
            *(["bystander got no answer"] if not self.beside else []),
            *([f"bystander got {len(failed)} times {failed[0]}"] if failed else []),
            *(["memory"] if self.too_much_memory else []),
            *([f"left: {self.left_over}"] if self.left_over else []),
        ]

    @property
    def too_much_memory(self) -> bool:
        """KV caches of valid requests are the operator's to bound (--kv-bytes)."""
        return self.memory > MOST_MEMORY + (self.kv if self.attack.sessions else 0)

    def cells(self, timed: bool) -> tuple[str, ...]:
        worst = max((delay.seconds for delay in self.beside), default=0.0)
        seconds = (p99(self.alone), p99(self.beside), worst)
        delays = [f"{1000 * one:.0f} ms" for one in seconds]
        verdict = "; ".join(self.faults(timed)) or "holds"
        answers = f"{len(self.alone)} + {len(self.beside)}"
        memory = (f"+{self.memory // MIB} MiB", f"{self.kv // MIB} MiB")
        return (self.attack.name, size(self.sent), answers, *delays, *memory, self.answers, verdict)


def p99(delays: Sequence[Delay]) -> float:
    """Of a hundred, the second worst."""
    ordered = sorted(delay.seconds for delay in delays)
    return ordered[-(len(ordered) // 100 + 1)] if ordered else 0.0


def size(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


async def beside(work: Callable[[], Awaitable[None]], bystander: Bystander, answers: int) -> Sequence[Delay]:
    """What the bystander sees while this is done over and over."""

    async def over_and_over() -> None:
        while True:
            with contextlib.suppress(OSError):
                await work()
            await asyncio.sleep(0.02)

    working = asyncio.create_task(over_and_over())
    try:
        return await bystander.answers(answers, HALF_SECONDS)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def undisturbed() -> None:
    await asyncio.sleep(1)


async def attacked(server: Server, bystander: Bystander, attack: Attack, answers: int) -> Row:
    target, reference = Target(server), Target(server)
    compared = (lambda: short_generations(reference, attack.sessions)) if attack.sessions else undisturbed
    alone = await beside(compared, bystander, answers)
    server.forget_peak()
    try:
        async with server.watching_kv() as kv:
            disturbed = await beside(lambda: attack.round(target), bystander, answers)
    finally:
        await target.hang_up()
    memory = server.peak_above_level()
    how = ", ".join(answer for answer, _ in target.answers.most_common(3)) or "no answer asked for"
    return Row(attack, target.sent, alone, disturbed, memory, max(kv), how, await server.left_over())


@contextlib.asynccontextmanager
async def started(server: Server) -> AsyncIterator[Bystander]:
    """The server and the bystander, both warm."""
    await server.start()
    bystander = await Bystander.start(server)
    try:
        await bystander.answers(5, HALF_SECONDS)
        for _ in range(2):  # as many rows in a pass as honest load has
            await short_generations(Target(server), 48)
        server.note_level()
        yield bystander
    finally:
        await bystander.end()
        await server.stop()


async def run(command: str, attacks: Sequence[Attack], answers: int, timed: bool) -> bool:
    """Whether all bounds hold."""
    holds, left = True, list(attacks)
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        while left:  # begins anew after an attack that left something behind
            server, spoilt = Server(command, Path(folder)), False
            async with started(server) as bystander:
                while left and not spoilt:
                    row = await attacked(server, bystander, left.pop(0), answers)
                    holds &= not row.faults(timed)
                    print(f"| {' | '.join(row.cells(timed))} |", flush=True)
                    spoilt = bool(row.left_over) or row.too_much_memory or not server.running
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description=__doc__)
    parser.add_argument("--server", default=OURS, metavar="COMMAND", help="what is attacked; default: this build's up")
    parser.add_argument("--only", default="", metavar="TEXT", help="attacks whose name has this text")
    parser.add_argument("--answers", type=int, default=ANSWERS, help="of the bystander, in each half")
    parser.add_argument("--short", action="store_true", help="some attacks, few answers, no bound on delays")
    options = parser.parse_args()
    attacks = [attack for attack in ATTACKS if options.only in attack.name and (attack.short or not options.short)]
    answers = 5 if options.short else options.answers
    return 0 if asyncio.run(run(options.server, attacks, answers, timed=not options.short)) else 1


if __name__ == "__main__":
    sys.exit(main())
