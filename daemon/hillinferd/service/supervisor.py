"""Keeps one device worker alive, and carries requests to it one at a time."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from hillinfer_core.errors import DeviceUnavailable, by_name

from ..driver.contract import Identity
from ..driver.settings import DriverSettings
from ..logs import get_logger
from ..worker import messages, packets

log = get_logger(__name__)

START_TIMEOUT_S = 30.0
"""Longest a new worker may take to open its drive. Our choice."""

PREPARE_TIMEOUT_S = 60.0
"""Longest a new worker may take for one request of ``on_ready``: discarding takes time. Our choice."""

_LONGEST_PAUSE_S = 10.0

Answered = Callable[[messages.Done | None, Exception | None], None]
"""Called once with what a request came to."""


class _Asked(NamedTuple):
    """A request that the worker has not answered yet; ``due`` is a time of the event loop."""

    sock: socket.socket
    what: str
    timeout_s: float
    due: float
    answered: Answered


class Supervisor:
    """Starts the worker of the drive called ``name``, restarts it when it dies, and kills it when it hangs.

    A worker that has not answered a request after ``request_timeout_s`` counts as hung. ``on_start`` is
    awaited before each worker is started, ``on_ready`` with each new worker before requests are let through,
    and ``on_death`` is called, without blocking, as soon as a worker that had become ready is gone. All on
    one event loop.
    """

    def __init__(
        self,
        name: str,
        settings: DriverSettings,
        log_level: str,
        *,
        request_timeout_s: float,
        on_start: Callable[[], Awaitable[None]],
        on_ready: Callable[[], Awaitable[None]],
        on_death: Callable[[], None],
    ) -> None:
        self._name = name
        self._settings = settings
        self._log_level = log_level
        self._timeout_s = request_timeout_s
        self._on_start = on_start
        self._on_ready = on_ready
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._sock: socket.socket | None = None
        self._opening: asyncio.Future[messages.Reply | None] | None = None
        self._asked: _Asked | None = None
        self._look: asyncio.TimerHandle | None = None
        self._up = False
        self._changed = asyncio.Event()
        self._there = asyncio.Event()
        self._there.set()
        self._hurry = asyncio.Event()
        self.identity: Identity | None = None
        self.reason = ""
        """Why the drive was taken away or could not be opened; empty once a worker serves."""
        self.restarts = 0
        self.exchanges = 0
        """Requests that a worker answered or let go unanswered."""
        self._moved = messages.Traffic()

    @property
    def pid(self) -> int:
        """Process id of the worker, 0 while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    @property
    def up(self) -> bool:
        """Whether :meth:`call` would reach a worker."""
        return self._up

    @property
    def state(self) -> str:
        """``serving``; ``restarting`` after a worker died; ``gone``: the drive is away or does not open."""
        if self._up:
            return "serving"
        return "gone" if self.reason else "restarting"

    @property
    def idle(self) -> bool:
        """Whether a worker serves and nothing is asked of it."""
        return self._up and self._asked is None

    def fileno(self) -> int:
        """Return the descriptor of the socket to the worker, -1 while there is none."""
        return -1 if self._sock is None else self._sock.fileno()

    def unavailable(self) -> DeviceUnavailable:
        """Return what to raise while no worker serves."""
        if self.reason:
            return DeviceUnavailable(f"drive {self._name} is gone ({self.reason}); try again when it is back")
        return self._died()

    def take_moved(self) -> messages.Traffic:
        """Return what workers have moved since this was last asked."""
        moved, self._moved = self._moved, messages.Traffic()
        return moved

    async def changes(self) -> AsyncIterator[bool]:
        """Yield :attr:`up` now and after each change, without end; for one reader."""
        while True:
            self._changed.clear()
            yield self._up
            await self._changed.wait()

    async def start(self) -> None:
        """Start a worker, wait for its drive and for ``on_ready``.

        Raises the worker's typed error or what ``on_start`` or ``on_ready`` raised, with no worker left
        behind.
        """
        try:
            await self._on_start()
            await self._spawn()
            self.identity = await self._opened()
            await self._on_ready()
            if not self._there.is_set():
                raise self.unavailable()
        except BaseException as error:
            await self._put_down()
            if self._there.is_set():
                self.reason = str(error) or type(error).__name__
            raise
        self.reason = ""
        self._up = True
        self._changed.set()

    async def call(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        """Carry out ``request``, passing ``fd`` along; one call at a time, as the work queue ensures.

        Raises the worker's typed error, or :class:`DeviceUnavailable` if there is no worker, or it dies or
        hangs meanwhile.
        """
        if not self._up:
            raise self.unavailable()
        return await self._exchange(request, fd, self._timeout_s)

    def send(self, request: messages.Request, answered: Answered) -> None:
        """Like :meth:`call`, without a task: ``answered`` is called, at once or later. Raises nothing."""
        if self._up:
            self._begin(request, None, self._timeout_s, answered)
        else:
            answered(None, self.unavailable())

    def expect(self, request: messages.Request, began: float, answered: Answered) -> None:
        """Like :meth:`send`, of a request that was sent to :meth:`fileno` at ``began`` of the loop's time."""
        if self._up and self._sock is not None:
            self._await(self._sock, request, began + self._timeout_s, self._timeout_s, answered)
        else:
            answered(None, self.unavailable())

    def hear(self, packet: bytes) -> None:
        """Take ``packet``, which somebody else has read of :meth:`fileno`, as the answer that is due."""
        try:
            reply = packets.decoded(memoryview(packet))
        except Exception as error:
            log.error("device worker answers what it should not", drive=self._name, error=repr(error))
            self.replace()
        else:
            self._hear(reply)

    async def prepare(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        """Like :meth:`call`, for ``on_ready``: before other requests are let through."""
        return await self._exchange(request, fd, PREPARE_TIMEOUT_S)

    async def watch(self) -> None:
        """Restart the worker whenever it dies, until cancelled; pauses grow from 0.1 s to 10 s.

        Also starts the first one if :meth:`start` failed. A drive that was taken away is waited for.
        """
        pause, said = 0.1, ""
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.error("device worker died", drive=self._name, pid=self._process.pid, exit_code=code)
                self._gone()
            await self._rest(pause)
            self.restarts += 1
            try:
                await self.start()
            except Exception as error:
                # Once, not with every attempt at a drive that stays away.
                if str(error) != said:
                    log.error("device worker did not restart", drive=self._name, error=str(error))
                pause, said = min(2 * pause, _LONGEST_PAUSE_S), str(error)
            else:
                log.info("device worker restarted", drive=self._name, pid=self.pid, restarts=self.restarts)
                pause, said = 0.1, ""

    def replace(self) -> None:
        """Kill the worker, so that :meth:`watch` starts another; harmless while there is none."""
        self._gone()
        self._kill()

    def take_away(self, reason: str) -> None:
        """Kill the worker, and start none until :meth:`bring_back`; ``reason`` is for those who ask."""
        self.reason = reason
        self._there.clear()
        self.replace()

    def set_log_level(self, level: str) -> None:
        """Have the next worker log from ``level``; one that runs keeps its own."""
        self._log_level = level

    def new_pool_id(self, pool_id: str) -> None:
        """Say what UUID the pool is to have if a worker makes it."""
        self._settings = replace(self._settings, new_id=pool_id)

    def bring_back(self, path: str) -> None:
        """Start a worker at once, unless there is one; the pool is at ``path`` now."""
        if self._up:
            return
        self._settings = replace(self._settings, path=path)
        self._hurry.set()
        self._there.set()

    async def stop(self) -> None:
        """End the worker: by hang-up, and after 5 s by force."""
        self._close_socket()
        self._hear(None)
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), 5.0)
            except TimeoutError:
                await self._put_down()

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "hillinferd.worker", str(theirs.fileno())),
                *(self._settings.to_json(), self._log_level),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the daemon, which then stops the worker in order.
                start_new_session=True,
            )
        self._sock = ours
        received = packets.Packets(ours)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable, ours, received)

    async def _opened(self) -> Identity:
        # Set before anything else can run on the loop that read the socket.
        self._opening = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                reply = await self._opening
        except TimeoutError:
            raise DeviceUnavailable(
                f"the device worker did not open its drive in {START_TIMEOUT_S:g} s"
            ) from None
        if not isinstance(reply, messages.Ready):
            raise self._error_of(reply)
        return reply.identity

    async def _rest(self, pause: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._hurry.wait()
        self._hurry.clear()
        await self._there.wait()

    async def _exchange(self, request: messages.Request, fd: int | None, timeout_s: float) -> messages.Done:
        result: asyncio.Future[messages.Done] = asyncio.get_running_loop().create_future()

        def answered(done: messages.Done | None, error: Exception | None) -> None:
            if result.done():
                return
            if done is not None:
                result.set_result(done)
            elif error is not None:
                result.set_exception(error)

        self._begin(request, fd, timeout_s, answered)
        return await result

    def _begin(self, request: messages.Request, fd: int | None, timeout_s: float, answered: Answered) -> None:
        sock = self._sock
        if sock is None:
            answered(None, self._died())
            return
        try:
            # Never blocks: with one request at a time the socket's buffer is empty.
            if fd is None:
                sock.send(packets.encode(request))
            else:
                socket.send_fds(sock, [packets.encode(request)], [fd])
        except OSError:
            self.replace()
            answered(None, self._died())
            return
        self._await(sock, request, asyncio.get_running_loop().time() + timeout_s, timeout_s, answered)

    def _await(
        self, sock: socket.socket, request: messages.Request, due: float, timeout_s: float, answered: Answered
    ) -> None:
        self._asked = _Asked(sock, type(request).__name__, timeout_s, due, answered)
        loop = asyncio.get_running_loop()
        # One timer looks after all requests that follow one another: making and cancelling one costs.
        if self._look is not None and self._look.when() > due:
            self._look.cancel()
            self._look = None
        if self._look is None:
            self._look = loop.call_at(due, self._look_after)

    def _look_after(self) -> None:
        self._look = None
        asked, loop = self._asked, asyncio.get_running_loop()
        if asked is None:
            return
        if loop.time() < asked.due:
            self._look = loop.call_at(asked.due, self._look_after)
            return
        self._asked = None
        self.exchanges += 1
        log.error("device worker hangs, killing it", drive=self._name, request=asked.what, pid=self.pid)
        if asked.sock is self._sock:
            self.replace()
        error = (
            f"the worker of drive {self._name} did not answer in {asked.timeout_s:g} s; it is being restarted"
        )
        asked.answered(None, DeviceUnavailable(error))

    def _readable(self, sock: socket.socket, received: packets.Packets) -> None:
        try:
            reply = received.reply()
        except BlockingIOError:
            return
        except OSError:
            reply = None
        if reply is not None:
            self._hear(reply)
        else:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            if sock is self._sock:
                self._gone()

    def _hear(self, reply: messages.Reply | None) -> None:
        asked, self._asked = self._asked, None
        if asked is None:
            if self._opening is not None and not self._opening.done():
                self._opening.set_result(reply)
            return
        self.exchanges += 1
        if isinstance(reply, messages.Done):
            self._moved.add(reply.traffic)
            asked.answered(reply, None)
            return
        if isinstance(reply, messages.Failed):
            self._moved.add(reply.traffic)
        asked.answered(None, self._error_of(reply))

    def _gone(self) -> None:
        was_up, self._up = self._up, False
        self._close_socket()
        if was_up:
            self._changed.set()
            self._on_death()
        # After what waited for its turn has failed: an answer, also this one, lets the next one begin.
        self._hear(None)

    def _close_socket(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _put_down(self) -> None:
        self._close_socket()
        self._hear(None)
        self._kill()
        if self._process is not None:
            await self._process.wait()
            self._process = None

    def _error_of(self, reply: messages.Reply | None) -> Exception:
        if isinstance(reply, messages.Failed):
            return by_name(reply.error)(reply.message)
        return self._died()

    def _died(self) -> DeviceUnavailable:
        if not self._there.is_set():
            return self.unavailable()
        # Without the reason, which this may become.
        return DeviceUnavailable(
            f"the worker of drive {self._name} died and is being restarted; try again in a moment"
        )
