#!/usr/bin/env python3
"""A server of ``gap-export serve`` under load: is every answer right, is anything lost, how fast.

    tools/load_serve.py bundle load --write        64 clients, each answer compared; memory
    tools/load_serve.py bundle trouble --write     overload, clients that leave, SIGTERM
    tools/load_serve.py bundle overhead --write    HTTP beside the session; 16 expressions

The bundle is best one of a demo model: questions are of RefShapes.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import typer
from pages import called_as, note, publish
from PIL import Image
from serve_load.asking import Connection, Question, Reply, encode, make_body, make_questions
from serve_load.server import Server, serving

from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.session import GroundingSession

NUM_QUESTIONS = 48
NUM_LEAVING = 1000
ROUNDS = 100
TOGETHER = 16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_BUNDLE = Path("bundle")


@app.callback()
def choose(bundle: Path) -> None:
    """Measure a server of one bundle."""
    global _BUNDLE  # noqa: PLW0603 - typer's way to an argument before the command
    _BUNDLE = bundle


@app.command("load")
def load(clients: int = 64, requests: int = 2000, seconds: float = 0, write: bool = False) -> None:
    """Many clients at a time, each answer compared with the session's.

    Args:
        clients: How many.
        requests: Of each.
        seconds: Stop asking after so long, and say how many were answered; 0: ask all.
        write: Put the figures into their page.
    """
    questions = _questions()
    with serving(_BUNDLE, "--queue", str(2 * clients)) as server:
        started = time.monotonic()
        ends = started + seconds if seconds else float("inf")
        replies, wrong = asyncio.run(_load(server, questions, clients, requests, ends))
        took = time.monotonic() - started
        together = server.figure("gap_export_ran_together_sum")
        runs = server.figure("gap_export_ran_together_count")
    statuses = Counter(reply.status for reply in replies)
    times = sorted(1e3 * reply.seconds for reply in replies)
    early, late = _memory(server.memory)
    lines = [
        "| what | figure |",
        "|---|---|",
        f"| clients, requests of each | {clients}, {len(replies) // clients} |",
        f"| answered, lost, wrong | {statuses[200]:,}, {len(replies) - statuses[200]}, {wrong} |",
        f"| minutes | {took / 60:.1f} |",
        f"| requests a second | {len(replies) / took:.0f} |",
        f"| time of an answer, p50, p95, p99 | {_percentiles(times)} ms |",
        f"| expressions that ran together, mean | {together / max(runs, 1):.1f} |",
        f"| memory at second and last tenth | {early:.0f}, {late:.0f} MB, decoders included |",
    ]
    _publish("serve-load", lines, write=write)
    sys.exit(int(bool(wrong or len(replies) - statuses[200])))


async def _load(
    server: Server, questions: list[Question], clients: int, requests: int, ends: float
) -> tuple[list[Reply], int]:
    replies: list[Reply] = []
    wrong = 0

    async def client(number: int) -> None:
        nonlocal wrong
        connection, draw = Connection(server.port), random.Random(number)
        for _ in range(requests):
            if time.monotonic() > ends:
                break
            question = draw.choice(questions)
            reply = await connection.ask(question.body)
            wrong += reply.status == 200 and not question.is_answered_by(reply.plain)
            # What it says is of no use any more, and would be memory.
            reply.plain.clear()
            replies.append(reply)
            if len(replies) % 2000 == 0:
                note(f"{len(replies):,} answers, {wrong} wrong, {server.memory[-1]:.0f} MB")
        await connection.close()

    await asyncio.gather(*map(client, range(clients)))
    return replies, wrong


@app.command("trouble")
def trouble(write: bool = False) -> None:
    """Overload, a thousand clients that leave, SIGTERM under load."""
    questions = _questions()
    with serving(_BUNDLE, "--queue", "64") as server:
        lines = ["| what | figure |", "|---|---|"]
        lines += asyncio.run(_overload(server, questions))
        lines += asyncio.run(_leave(server, questions))
        lines += asyncio.run(_terminate(server, questions))
    _publish("serve-trouble", lines, write=write)


async def _overload(server: Server, questions: list[Question]) -> list[str]:
    async def client(number: int) -> list[bool | int]:
        connection, draw = Connection(server.port), random.Random(number)
        found: list[bool | int] = []
        for _ in range(8):
            question = draw.choice(questions)
            reply = await connection.ask(question.body)
            found.append(
                question.is_answered_by(reply.plain) if reply.status == 200 else reply.status
            )
            if reply.status == 429:
                assert int(reply.head["retry-after"]) >= 1
        await connection.close()
        return found

    note("overload")
    counts = Counter(
        one for found in await asyncio.gather(*map(client, range(512))) for one in found
    )
    after = await Connection(server.port).ask(questions[0].body)
    assert questions[0].is_answered_by(after.plain), after
    others = {status: count for status, count in counts.items() if status not in (True, 429)}
    return [
        f"| 512 clients at a queue of 64: right answers, 429 | {counts[True]:,}, {counts[429]:,} |",
        f"| other answers | {others or 'none'} |",
        f"| the next request | {after.status} after {1e3 * after.seconds:.0f} ms |",
    ]


async def _leave(server: Server, questions: list[Question]) -> list[str]:
    note("clients that leave")
    before = server.figure("gap_export_ran_together_sum")
    draw = random.Random(0)
    for _ in range(NUM_LEAVING // 50):
        await asyncio.gather(
            *(
                Connection(server.port).leave(draw.choice(questions).body, draw.uniform(0, 0.05))
                for _ in range(50)
            )
        )
    started = time.monotonic()
    while server.figure("gap_export_requests_running"):
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - started
    computed = server.figure("gap_export_ran_together_sum") - before
    asked = sum(len(question.expected) for question in questions) / len(questions)
    after = await Connection(server.port).ask(questions[0].body)
    assert questions[0].is_answered_by(after.plain), after
    return [
        f"| {NUM_LEAVING:,} clients that leave within 50 ms: requests that remain | 0, after "
        f"{1e3 * seconds:.0f} ms |",
        f"| of about {NUM_LEAVING * asked:,.0f} expressions, were computed | {computed:,.0f} |",
        f"| the next request | {after.status} after {1e3 * after.seconds:.0f} ms |",
    ]


async def _terminate(server: Server, questions: list[Question]) -> list[str]:
    note("SIGTERM")
    got: dict[str, bool] = {}

    async def client(number: int) -> None:
        connection, draw = Connection(server.port), random.Random(number)
        for count in range(10_000):
            question, name = draw.choice(questions), f"stop-{number}-{count}"
            reply = await connection.ask(question.body, name=name)
            if reply.status != 200:
                # Its connection was closed; what the server had let in stands in its log.
                return
            got[name] = question.is_answered_by(reply.plain)

    tasks = [asyncio.create_task(client(number)) for number in range(32)]
    await asyncio.sleep(3)
    code = await asyncio.to_thread(server.stop)
    await asyncio.gather(*tasks)
    await asyncio.sleep(0.5)
    for bug in server.bugs:
        note(str(bug.get("trace", bug)))
    accepted = {name for name in server.answered if name.startswith("stop-")}
    return [
        f"| SIGTERM under 32 clients: let in, answered, lost, wrong | {len(accepted):,}, "
        f"{len(accepted & got.keys()):,}, {len(accepted - got.keys())}, "
        f"{sum(not right for right in got.values())} |",
        f"| exit code; errors in the server's log | {code}; {len(server.bugs)} |",
    ]


@app.command("overhead")
def overhead(rounds: int = ROUNDS, write: bool = False) -> None:
    """What HTTP adds to ``session.ground``, and what asking together saves.

    Args:
        rounds: Images, each of which is new to server and session.
        write: Put the figures into their page.
    """
    with GroundingSession.open(_BUNDLE) as session, serving(_BUNDLE) as server:
        found = asyncio.run(_overhead(session, server, rounds))
    session_ms, http_ms, one_ms, each_ms, at_once_ms = map(statistics.median, found)
    lines = [
        "| what, median | ms |",
        "|---|---|",
        f"| `session.ground` of a PNG file | {session_ms:.1f} |",
        f"| the same by HTTP | {http_ms:.1f} |",
        f"| added by HTTP | {http_ms - session_ms:.1f} |",
        f"| {TOGETHER} expressions about an image, one request | {one_ms:.1f} |",
        f"| {TOGETHER} requests, one after the other | {each_ms:.1f} ({each_ms / one_ms:.1f} x) |",
        f"| {TOGETHER} requests at once | {at_once_ms:.1f} ({at_once_ms / one_ms:.1f} x) |",
    ]
    _publish("serve-overhead", lines, write=write)


async def _overhead(
    session: GroundingSession, server: Server, rounds: int
) -> tuple[list[float], ...]:
    connections = [Connection(server.port) for _ in range(TOGETHER)]
    found: tuple[list[float], ...] = ([], [], [], [], [])
    for number in range(-5, rounds):
        scene = generate_scene(split="heldout", seed=2, index=number + 5)
        texts = [one.text for one in scene.expressions]
        words = [texts[n % len(texts)] for n in range(TOGETHER)]
        # Another image for each way, or what one computed would be kept for the next.
        images = [encode(Image.fromarray(scene.image ^ n), "PNG") for n in range(4)]
        started = time.perf_counter()
        session.ground(EncodedImage(data=images[0], name="the image"), words[0])
        times = [time.perf_counter() - started]
        for image, asked in ((images[0], words[:1]), (images[1], words)):
            times.append((await connections[0].ask(make_body(image, asked))).seconds)
        bodies = [[make_body(image, [one]) for one in words] for image in images[2:]]
        started = time.perf_counter()
        for body in bodies[0]:
            await connections[0].ask(body)
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        await asyncio.gather(*(c.ask(body) for c, body in zip(connections, bodies[1], strict=True)))
        times.append(time.perf_counter() - started)
        if number >= 0:
            for each, seconds in zip(found, times, strict=True):
                each.append(1e3 * seconds)
    return found


def _questions() -> list[Question]:
    note("asking a session")
    with GroundingSession.open(_BUNDLE) as session:
        return make_questions(session, NUM_QUESTIONS)


def _percentiles(times: list[float]) -> str:
    return ", ".join(
        f"{times[min(len(times) * p // 100, len(times) - 1)]:.0f}" for p in (50, 95, 99)
    )


def _memory(seen: list[float]) -> tuple[float, float]:
    """Its mean in the second tenth of the time, and in the last one."""
    tenth = max(1, len(seen) // 10)
    return statistics.mean(seen[tenth : 2 * tenth] or seen), statistics.mean(seen[-tenth:])


def _publish(name: str, lines: list[str], *, write: bool) -> None:
    others = os.getloadavg()[0]
    command = f"`{called_as('load_serve.py').replace(str(_BUNDLE), _BUNDLE.name)}`"
    end = f"{command} on {os.cpu_count()} CPU cores, load {others:.1f} with what else ran there."
    publish(name, "\n".join([*lines, "", end]), write=write)


if __name__ == "__main__":
    app()
