"""The supervisor with a real worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hillinfer_core.errors import ConfigError, DeviceUnavailable
from hillinferd.driver.settings import DriverSettings
from hillinferd.service.supervisor import Supervisor
from hillinferd.worker import messages


def settings(tmp_path: Path) -> DriverSettings:
    return DriverSettings("host", str(tmp_path / "pool"), 1 << 20, keep=False, key_memory=1 << 20)


async def nothing() -> None: ...


def supervise(
    tmp_path: Path,
    on_ready: Callable[[], Awaitable[None]] = nothing,
    on_death: Callable[[], None] = lambda: None,
    request_timeout_s: float = 20.0,
) -> Supervisor:
    return Supervisor(
        "cold",
        settings(tmp_path),
        "info",
        request_timeout_s=request_timeout_s,
        on_start=nothing,
        on_ready=on_ready,
        on_death=on_death,
    )


async def until(supervisor: Supervisor, up: bool) -> None:
    async with asyncio.timeout(60):
        async for now in supervisor.changes():
            if now is up:
                return


def test_a_worker_that_could_not_be_prepared_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        prepared: list[int] = []

        async def on_ready() -> None:
            prepared.append(supervisor.pid)
            if len(prepared) in (2, 3):
                raise RuntimeError("not this one")

        supervisor = supervise(tmp_path, on_ready)
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        os.kill(supervisor.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
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
        supervisor = supervise(tmp_path, on_ready)
        with pytest.raises(RuntimeError, match="not this one"):
            await supervisor.start()
        assert not supervisor.up
        assert supervisor.pid == 0
        assert not Path(f"/proc/{pids[0]}").exists()

    asyncio.run(scenario())


def test_a_worker_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        deaths: list[int] = []
        supervisor = supervise(
            tmp_path, on_death=lambda: deaths.append(supervisor.pid), request_timeout_s=0.5
        )
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        hung = supervisor.pid
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(DeviceUnavailable, match=r"drive cold did not answer in 0\.5 s"):
            await supervisor.call(messages.Health())
        assert supervisor.state == "restarting"
        with pytest.raises(DeviceUnavailable, match="drive cold died and is being restarted"):
            await supervisor.call(messages.Health())
        await until(supervisor, up=True)
        assert not Path(f"/proc/{hung}").exists()
        assert (len(deaths), supervisor.restarts, supervisor.state) == (1, 1, "serving")
        assert await supervisor.call(messages.Health()) == messages.Done()
        watch.cancel()
        await supervisor.stop()

    asyncio.run(scenario())


def test_every_request_has_all_of_its_time(tmp_path: Path) -> None:
    """One timer looks after all: it was set for an earlier request, which was answered."""

    async def scenario() -> None:
        supervisor, loop = supervise(tmp_path, request_timeout_s=0.5), asyncio.get_running_loop()
        await supervisor.start()
        for _ in range(3):
            assert await supervisor.call(messages.Health()) == messages.Done()
        await asyncio.sleep(0.3)
        os.kill(supervisor.pid, signal.SIGSTOP)
        asked = loop.time()
        with pytest.raises(DeviceUnavailable, match=r"did not answer in 0\.5 s"):
            await supervisor.call(messages.Health())
        assert loop.time() - asked >= 0.5
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_drive_that_was_taken_away_is_not_tried_until_it_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = supervise(tmp_path)
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        worker = supervisor.pid
        # It hangs in a request, as it would on a drive that has just been pulled out.
        os.kill(worker, signal.SIGSTOP)
        call = asyncio.create_task(supervisor.call(messages.Health()))
        await asyncio.sleep(0.05)
        supervisor.take_away("pulled out")
        with pytest.raises(DeviceUnavailable, match=r"drive cold is gone \(pulled out\)"):
            await call
        with pytest.raises(DeviceUnavailable, match="when it is back"):
            await supervisor.call(messages.Health())
        await asyncio.sleep(0.5)
        assert (supervisor.state, supervisor.reason, supervisor.pid) == ("gone", "pulled out", 0)
        assert supervisor.restarts == 0
        supervisor.bring_back(str(tmp_path / "elsewhere"))
        await until(supervisor, up=True)
        assert (supervisor.state, supervisor.reason, supervisor.restarts) == ("serving", "", 1)
        assert supervisor.identity is not None
        assert supervisor.identity.path == str(tmp_path / "elsewhere")
        supervisor.bring_back("/nowhere")
        assert supervisor.state == "serving"
        watch.cancel()
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_drive_that_is_taken_away_while_its_worker_starts_stays_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async def on_ready() -> None:
            if supervisor.restarts == 1:
                supervisor.take_away("pulled out")

        supervisor = supervise(tmp_path, on_ready)
        await supervisor.start()
        watch = asyncio.create_task(supervisor.watch())
        os.kill(supervisor.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while supervisor.state != "gone" or supervisor.pid:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert (supervisor.state, supervisor.restarts, supervisor.pid) == ("gone", 1, 0)
        supervisor.bring_back(str(tmp_path / "pool"))
        await until(supervisor, up=True)
        watch.cancel()
        await supervisor.stop()

    asyncio.run(scenario())


def test_what_keeps_a_drive_from_being_opened_is_its_reason_until_it_opens(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "pool").write_text("years of work")
        supervisor = supervise(tmp_path)
        # Without keep a pool must be new.
        with pytest.raises(ConfigError, match="has content"):
            await supervisor.start()
        assert supervisor.state == "gone"
        watch = asyncio.create_task(supervisor.watch())
        await asyncio.sleep(0.3)
        assert "has content" in supervisor.reason
        (tmp_path / "pool").unlink()
        # No one says that it can be opened now.
        await until(supervisor, up=True)
        assert (supervisor.state, supervisor.reason) == ("serving", "")
        watch.cancel()
        await supervisor.stop()

    asyncio.run(scenario())
