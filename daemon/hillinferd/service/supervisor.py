"""Keeps one device worker alive, and carries requests to it one at a time."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

from hillinfer_core.errors import DeviceUnavailable, by_name

from ..driver.contract import Identity
from ..driver.settings import DriverSettings
from ..logs import get_logger
from ..worker import messages

log = get_logger(__name__)

REQUEST_TIMEOUT_S = 60.0
"""Longest a request may take before the worker counts as hung; real ones take at most seconds. Our choice."""

START_TIMEOUT_S = 30.0
"""Longest a new worker may take to open its drive."""

_LONGEST_PAUSE_S = 10.0


class Supervisor:
    """Starts the worker, restarts it when it dies, and kills it when it hangs.

    ``on_death`` is called, without blocking, as soon as a worker is gone; ``on_ready`` is awaited with each
    new worker before requests are let through. All on one event loop.
    """

    def __init__(
        self,
        settings: DriverSettings,
        log_level: str,
        on_death: Callable[[], None],
        on_ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._log_level = log_level
        self._on_death = on_death
        self._on_ready = on_ready
        self._process: asyncio.subprocess.Process | None = None
        self._sock: socket.socket | None = None
        self._replies: asyncio.Queue[messages.Reply | None] = asyncio.Queue()
        self._up = False
        self._changed = asyncio.Event()
        self.identity: Identity | None = None
        self.restarts = 0
        self.traffic = messages.Traffic()

    @property
    def pid(self) -> int:
        """Process id of the worker, 0 while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    @property
    def up(self) -> bool:
        """Whether :meth:`call` would reach a worker."""
        return self._up

    async def changes(self) -> AsyncIterator[bool]:
        """Yield :attr:`up` now and after each change, without end; for one reader."""
        while True:
            self._changed.clear()
            yield self._up
            await self._changed.wait()

    async def start(self) -> None:
        """Start a worker, wait for its drive and for ``on_ready``.

        Raises the worker's typed error or what ``on_ready`` raised, with no worker left behind.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hillinferd.worker", str(theirs.fileno())),
                *(self._settings.to_json(), self._log_level),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the daemon, which then stops the worker in order.
                start_new_session=True,
            )
        self._sock, self._replies = ours, asyncio.Queue()
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable, ours, self._replies)
        try:
            reply = await asyncio.wait_for(self._replies.get(), START_TIMEOUT_S)
        except TimeoutError:
            await self._put_down()
            raise DeviceUnavailable(
                f"the device worker did not open its drive in {START_TIMEOUT_S:g} s"
            ) from None
        if not isinstance(reply, messages.Ready):
            await self._put_down()
            raise _error_of(reply)
        self.identity = reply.identity
        try:
            await self._on_ready()
        except BaseException:
            await self._put_down()
            raise
        self._up = True
        self._changed.set()

    async def call(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        """Carry out ``request``, passing ``fd`` along; one call at a time, as the work queue ensures.

        Raises the worker's typed error, or :class:`DeviceUnavailable` if there is no worker, or it dies or
        hangs meanwhile.
        """
        if not self._up:
            raise DeviceUnavailable("the device worker is being restarted; try again in a moment")
        return await self._exchange(request, fd)

    async def prepare(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        """Like :meth:`call`, for ``on_ready``: before other requests are let through."""
        return await self._exchange(request, fd)

    async def watch(self) -> None:
        """Restart the worker whenever it dies, until cancelled; pauses grow from 0.1 s to 10 s."""
        pause = 0.1
        while True:
            if self._process is not None:
                code = await self._process.wait()
                log.error("device worker died", pid=self._process.pid, exit_code=code)
                self._gone()
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self.start()
            except Exception as error:
                log.error("device worker did not restart", error=str(error))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                log.info("device worker restarted", pid=self.pid, restarts=self.restarts)
                pause = 0.1

    def replace(self) -> None:
        """Kill the worker, so that :meth:`watch` starts another; harmless while there is none."""
        self._gone()
        self._kill()

    async def stop(self) -> None:
        """End the worker: by hang-up, and after 5 s by force."""
        self._close_socket()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), 5.0)
            except TimeoutError:
                await self._put_down()

    async def _exchange(self, request: messages.Request, fd: int | None) -> messages.Done:
        sock = self._sock
        if sock is None:
            raise DeviceUnavailable("the device worker is gone; it is being restarted")
        try:
            # Never blocks: with one request at a time the socket's buffer is empty.
            socket.send_fds(sock, [messages.encode(request)], [fd] if fd is not None else [])
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the reply.
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                reply = await self._replies.get()
        except TimeoutError:
            log.error("device worker hangs, killing it", request=type(request).__name__, pid=self.pid)
            self._gone()
            self._kill()
            raise DeviceUnavailable(f"the device worker did not answer in {REQUEST_TIMEOUT_S:g} s") from None
        except OSError as error:
            self._gone()
            self._kill()
            raise DeviceUnavailable(f"the device worker is gone ({error}); it is being restarted") from None
        if isinstance(reply, messages.Done | messages.Failed):
            self.traffic.add(reply.traffic)
        if not isinstance(reply, messages.Done):
            raise _error_of(reply)
        return reply

    def _readable(self, sock: socket.socket, replies: asyncio.Queue[messages.Reply | None]) -> None:
        try:
            reply = messages.receive_reply(sock)
        except BlockingIOError:
            return
        except OSError:
            reply = None
        replies.put_nowait(reply)
        if reply is None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            if sock is self._sock:
                self._gone()

    def _gone(self) -> None:
        was_up, self._up = self._up, False
        self._close_socket()
        # Whoever waits for an answer of this worker must not wait until the next one is there.
        self._replies.put_nowait(None)
        if was_up:
            self._changed.set()
            self._on_death()

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
        self._kill()
        if self._process is not None:
            await self._process.wait()
            self._process = None


def _error_of(reply: messages.Reply | None) -> Exception:
    if isinstance(reply, messages.Failed):
        return by_name(reply.error)(reply.message)
    return DeviceUnavailable("the device worker died; its contexts are lost, open and fill new ones")
