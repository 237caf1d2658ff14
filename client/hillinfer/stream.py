"""The session's evaluation stream: one question, one answer, each within its deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from hillinfer_core import errors
from hillinfer_core.v1 import cold_pool_pb2, cold_pool_pb2_grpc


class EvaluateStream:
    """A bidirectional Evaluate stream that opens at the first `ask`, and again after an error.

    A stream turn costs about half of what a unary call does, and evaluation is
    asked once a layer and token. Not thread-safe: the session's lock covers `ask`.
    """

    def __init__(
        self, stub: cold_pool_pb2_grpc.ColdPoolStub, metadata: tuple[tuple[str, str], ...], timeout_s: float
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._requests: queue.SimpleQueue[cold_pool_pb2.EvaluateRequest | None] = queue.SimpleQueue()
        self._call: Any = None
        self._watchdog: _Watchdog | None = None

    def ask(
        self, request: cold_pool_pb2.EvaluateRequest, meanwhile: Callable[[], None] | None = None
    ) -> cold_pool_pb2.EvaluateResponse:
        """Sends `request` and waits for its answer, `timeout_s` seconds at most.

        Does what is to be done `meanwhile`, which must not raise, before it waits.
        `request` may be changed and sent again once this returned. Raises gRPC's
        error of the failed evaluation, `DeadlineExceeded` when no answer came in
        time, `DaemonUnavailable` when none will; the next `ask` opens a new stream.
        """
        if self._call is None:
            self._open()
        call, watchdog = self._call, self._watchdog
        assert watchdog is not None
        watchdog.arm(call, self._timeout_s)
        try:
            self._requests.put(request)
            if meanwhile is not None:
                meanwhile()
            response: cold_pool_pb2.EvaluateResponse = next(call)
        except StopIteration:
            self._drop()
            raise errors.DaemonUnavailable(
                "evaluate: the daemon ended the stream; connect a new session"
            ) from None
        except grpc.RpcError:
            self._drop()
            if watchdog.expired:
                raise errors.DeadlineExceeded(
                    f"evaluate: no answer within {self._timeout_s:g} s; see the daemon's log"
                ) from None
            raise
        except BaseException:
            # An interrupted wait leaves its answer in the stream, where the next ask would take it.
            self._drop()
            raise
        watchdog.disarm()
        if watchdog.expired:
            # The answer and the deadline came together: the stream is already cancelled.
            self._drop()
        return response

    def close(self) -> None:
        """Ends the stream."""
        self._drop()

    def _open(self) -> None:
        self._requests = queue.SimpleQueue()
        self._watchdog = _Watchdog()
        self._call = self._stub.Evaluate(_until_none(self._requests), metadata=self._metadata)

    def _drop(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._requests.put(None)
            self._call = None
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None


def _until_none(
    requests: queue.SimpleQueue[cold_pool_pb2.EvaluateRequest | None],
) -> Iterator[cold_pool_pb2.EvaluateRequest]:
    return iter(requests.get, None)


class _Watchdog:
    """Cancels a stream whose answer is overdue.

    gRPC has a deadline for a whole stream, none for one answer. The thread
    sleeps until the deadline it knows; an answer in time only clears the
    deadline and does not wake it, so arming costs no switch of threads.
    """

    def __init__(self) -> None:
        self.expired = False
        self._condition = threading.Condition()
        self._call: Any = None
        self._deadline = 0.0
        self._idle = False
        self._stopped = False
        threading.Thread(target=self._run, name="hillinfer-evaluate-deadline", daemon=True).start()

    def arm(self, call: Any, timeout_s: float) -> None:
        with self._condition:
            self._call = call
            self._deadline = time.monotonic() + timeout_s
            if self._idle:
                self._condition.notify()

    def disarm(self) -> None:
        with self._condition:
            self._call = None

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._call = None
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._stopped:
                if self._call is None:
                    self._idle = True
                    self._condition.wait()
                    self._idle = False
                elif (left := self._deadline - time.monotonic()) > 0:
                    self._condition.wait(left)
                else:
                    self.expired = True
                    self._call.cancel()
                    self._call = None
