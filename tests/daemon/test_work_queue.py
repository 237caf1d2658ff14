from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from hillinfer_core.errors import DeadlineExceeded, DeviceUnavailable
from hillinferd.service.work_queue import End, Piece, Priority, WorkQueue


@dataclass(frozen=True)
class Someone:
    session_id: int
    weight: float = 1.0


def with_queue(scenario: Callable[[WorkQueue], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        queue = WorkQueue()
        pump = asyncio.create_task(queue.run())
        try:
            await scenario(queue)
        finally:
            pump.cancel()

    asyncio.run(run())


class Recorder:
    """Work that notes its name when it runs; the first one waits at a gate, so that the rest queues up."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.gate = asyncio.Event()
        self.running = asyncio.Event()

    def note(self, name: str) -> Callable[[], Awaitable[str]]:
        async def work() -> str:
            self.ran.append(name)
            return name

        return work

    async def block(self) -> None:
        self.running.set()
        await self.gate.wait()


def test_sessions_take_turns_and_each_keeps_its_order() -> None:
    async def scenario(queue: WorkQueue) -> None:
        recorder = Recorder()
        first = asyncio.create_task(queue.submit(Someone(9), recorder.block))
        await recorder.running.wait()
        names = ["a1", "a2", "a3", "b1", "b2", "c1"]
        tasks = [
            asyncio.create_task(queue.submit(Someone(ord(name[0])), recorder.note(name))) for name in names
        ]
        await asyncio.sleep(0)
        urgent = asyncio.create_task(queue.submit_urgent(recorder.note("urgent")))
        await asyncio.sleep(0)
        recorder.gate.set()
        assert await asyncio.gather(*tasks) == names
        await asyncio.gather(first, urgent)
        assert recorder.ran[:4] == ["urgent", "a1", "b1", "c1"]
        # Whose second is first is a matter of the microseconds that the first ones took.
        assert sorted(recorder.ran[4:]) == ["a2", "a3", "b2"]
        assert recorder.ran.index("a2") < recorder.ran.index("a3")

    with_queue(scenario)


def test_cancel_fails_what_waits_and_lets_what_runs_end() -> None:
    async def scenario(queue: WorkQueue) -> None:
        recorder = Recorder()
        running = asyncio.create_task(queue.submit(Someone(1), recorder.block))
        await recorder.running.wait()
        waiting = asyncio.create_task(queue.submit(Someone(1), recorder.note("mine")))
        other = asyncio.create_task(queue.submit(Someone(2), recorder.note("other")))
        await asyncio.sleep(0)
        queue.cancel(1, DeviceUnavailable("gone"))
        with pytest.raises(DeviceUnavailable):
            await waiting
        recorder.gate.set()
        await asyncio.gather(running, other)
        assert recorder.ran == ["other"]

    with_queue(scenario)


def test_work_whose_deadline_passed_or_whose_waiter_left_never_runs() -> None:
    async def scenario(queue: WorkQueue) -> None:
        recorder = Recorder()
        running = asyncio.create_task(queue.submit(Someone(1), recorder.block))
        await recorder.running.wait()
        late = asyncio.create_task(queue.submit(Someone(1), recorder.note("late"), time.monotonic()))
        left = asyncio.create_task(queue.submit(Someone(1), recorder.note("left")))
        await asyncio.sleep(0)
        left.cancel()
        recorder.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await running
        assert await queue.submit(Someone(1), recorder.note("next")) == "next"
        assert recorder.ran == ["next"]

    with_queue(scenario)


def test_an_error_reaches_its_waiter_and_nobody_else() -> None:
    async def scenario(queue: WorkQueue) -> None:
        async def fail() -> None:
            raise DeviceUnavailable("broken")

        with pytest.raises(DeviceUnavailable, match="broken"):
            await queue.submit(Someone(1), fail)
        assert await queue.submit(Someone(1), Recorder().note("fine")) == "fine"

    with_queue(scenario)


def test_an_observer_is_told_of_every_piece_that_leaves_the_queue() -> None:
    async def scenario(queue: WorkQueue) -> None:
        told: list[Piece] = []
        queue.observe = told.append
        recorder, mine = Recorder(), Someone(1)

        async def fail() -> None:
            raise DeviceUnavailable("broken")

        running = asyncio.create_task(queue.submit(mine, recorder.block, operation="evaluate"))
        await recorder.running.wait()
        late = asyncio.create_task(
            queue.submit(mine, recorder.note("x"), time.monotonic(), operation="fetch")
        )
        failing = asyncio.create_task(queue.submit(mine, fail, operation="append", priority=Priority.bulk))
        await asyncio.sleep(0)
        queue.cancel(2, DeviceUnavailable("nobody"))
        recorder.gate.set()
        await asyncio.gather(running, late, failing, return_exceptions=True)
        await queue.submit_urgent(recorder.note("y"), operation="detach")
        assert [(piece.operation, piece.flow, type(piece.error)) for piece in told] == [
            ("evaluate", mine, type(None)),
            ("fetch", mine, DeadlineExceeded),
            ("append", mine, DeviceUnavailable),
            ("detach", None, type(None)),
        ]
        assert told[1].service_s == 0 < told[0].service_s
        assert all(piece.queue_s >= 0 for piece in told)

    with_queue(scenario)


def test_the_next_piece_begins_before_the_last_is_told_of_and_all_are_told_in_order() -> None:
    async def scenario(queue: WorkQueue) -> None:
        happened: list[str] = []
        queue.observe = lambda piece: happened.append(f"told {piece.operation}")
        ends: list[End] = []
        await asyncio.sleep(0)  # The queue is open.
        results = [asyncio.get_running_loop().create_future() for _ in range(3)]

        def fails_at_once(end: End) -> None:
            happened.append("second begins")
            end(None, DeviceUnavailable("away"))

        def third(end: End) -> None:
            happened.append("third begins")
            ends.append(end)

        queue.enter(Someone(1), ends.append, results[0], operation="first")
        queue.enter(Someone(2), fails_at_once, results[1], operation="second")
        queue.enter(Someone(3), third, results[2], operation="third")
        ends.pop()(None, None)
        assert happened == ["second begins", "told first", "told second", "third begins"]
        assert isinstance(results[1].exception(), DeviceUnavailable)
        ends.pop()(None, None)
        assert happened[-1] == "told third"

    with_queue(scenario)


def test_what_began_before_it_entered_is_charged_from_then() -> None:
    """The express hands over what is under way: whoever waits for it goes first after it."""

    async def scenario() -> list[str]:
        now = 100.0
        pieces: list[Piece] = []
        queue = WorkQueue(pieces.append, clock=lambda: now)
        pump = asyncio.create_task(queue.run())
        await asyncio.sleep(0)
        assert queue.idle
        ends: list[tuple[str, End]] = []

        def enter(name: str, began: float | None = None) -> None:
            result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue.enter(
                Someone(ord(name)), lambda end: ends.append((name, end)), result, operation=name, began=began
            )

        enter("a", began=97.0)
        assert not queue.idle
        enter("a")
        enter("b")
        enter("b")
        now = 101.0
        for seconds in (1.0, 1.0, 1.0, 0.0):
            ends[-1][1](None, None)
            now += seconds
        pump.cancel()
        # Four seconds of the first piece, not one, so two of the other session's before its next.
        assert (pieces[0].queue_s, pieces[0].service_s) == (0.0, 4.0)
        return [name for name, _ in ends]

    assert asyncio.run(scenario()) == ["a", "b", "b", "a"]
