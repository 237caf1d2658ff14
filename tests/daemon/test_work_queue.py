from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from hillinfer_core.errors import DeadlineExceeded, DeviceUnavailable, QuotaExceeded
from hillinferd.service.work_queue import MAX_WAITING, WorkQueue


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
        first = asyncio.create_task(queue.submit(9, recorder.block))
        await recorder.running.wait()
        names = ["a1", "a2", "a3", "b1", "b2", "c1"]
        tasks = [asyncio.create_task(queue.submit(ord(name[0]), recorder.note(name))) for name in names]
        await asyncio.sleep(0)
        urgent = asyncio.create_task(queue.submit_urgent(recorder.note("urgent")))
        await asyncio.sleep(0)
        recorder.gate.set()
        assert await asyncio.gather(*tasks) == names
        await asyncio.gather(first, urgent)
        assert recorder.ran == ["urgent", "a1", "b1", "c1", "a2", "b2", "a3"]

    with_queue(scenario)


def test_cancel_fails_what_waits_and_lets_what_runs_end() -> None:
    async def scenario(queue: WorkQueue) -> None:
        recorder = Recorder()
        running = asyncio.create_task(queue.submit(1, recorder.block))
        await recorder.running.wait()
        waiting = asyncio.create_task(queue.submit(1, recorder.note("mine")))
        other = asyncio.create_task(queue.submit(2, recorder.note("other")))
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
        running = asyncio.create_task(queue.submit(1, recorder.block))
        await recorder.running.wait()
        late = asyncio.create_task(queue.submit(1, recorder.note("late"), time.monotonic()))
        left = asyncio.create_task(queue.submit(1, recorder.note("left")))
        await asyncio.sleep(0)
        left.cancel()
        recorder.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await running
        assert await queue.submit(1, recorder.note("next")) == "next"
        assert recorder.ran == ["next"]

    with_queue(scenario)


def test_an_error_reaches_its_waiter_and_nobody_else() -> None:
    async def scenario(queue: WorkQueue) -> None:
        async def fail() -> None:
            raise DeviceUnavailable("broken")

        with pytest.raises(DeviceUnavailable, match="broken"):
            await queue.submit(1, fail)
        assert await queue.submit(1, Recorder().note("fine")) == "fine"

    with_queue(scenario)


def test_a_session_cannot_fill_the_queue_without_end() -> None:
    async def scenario(queue: WorkQueue) -> None:
        recorder = Recorder()
        running = asyncio.create_task(queue.submit(1, recorder.block))
        await recorder.running.wait()
        waiting = [asyncio.create_task(queue.submit(1, recorder.note("x"))) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(QuotaExceeded):
            await queue.submit(1, recorder.note("too many"))
        recorder.gate.set()
        await asyncio.gather(running, *waiting)

    with_queue(scenario)
