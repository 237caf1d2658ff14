"""The supervisor with a real worker."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from hillinferd.driver.settings import DriverSettings
from hillinferd.service.supervisor import Supervisor
from hillinferd.worker import messages


def settings(tmp_path: Path) -> DriverSettings:
    return DriverSettings("host", str(tmp_path / "pool"), 1 << 20, keep=False, key_memory=1 << 20)


def test_a_worker_that_could_not_be_prepared_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        prepared: list[int] = []

        async def on_ready() -> None:
            prepared.append(supervisor.pid)
            if len(prepared) in (2, 3):
                raise RuntimeError("not this one")

        supervisor = Supervisor(settings(tmp_path), "info", lambda: None, on_ready)
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        os.kill(supervisor.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            async for up in supervisor.changes():
                if up and len(prepared) == 4:
                    break
        assert supervisor.restarts == 3
        assert len(set(prepared)) == 4
        for pid in prepared[:3]:
            assert not Path(f"/proc/{pid}").exists()
        assert await supervisor.call(messages.Discard([])) == messages.Done()
        watch.cancel()
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_first_worker_that_could_not_be_prepared_does_not_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def on_ready() -> None:
            pids.append(supervisor.pid)
            raise RuntimeError("not this one")

        pids: list[int] = []
        supervisor = Supervisor(settings(tmp_path), "info", lambda: None, on_ready)
        with pytest.raises(RuntimeError, match="not this one"):
            await supervisor.start()
        assert not supervisor.up
        assert supervisor.pid == 0
        assert not Path(f"/proc/{pids[0]}").exists()

    asyncio.run(scenario())
