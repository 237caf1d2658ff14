"""Connections in masses, silent ones, half-open ones, and descriptors that nobody asked for."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from honest import SHAPE, TOKENS, Honest
from raw_client import CALL_S, RawClient, Refused, attach_request, random_rows, wait_for

from hillinfer_core.attach_socket import connect
from hillinfer_core.protocol import TOKEN_KEY, attach_socket, grpc_socket, metrics_socket
from hillinfer_core.v1 import attach_pb2
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.rpc.attach import REQUEST_TIMEOUT_S, SILENT_LIMIT

CONNECTIONS = 2000
GROWTH = 192 << 20
"""Bytes by which the daemon may grow beside this many: measured are 40 MB."""

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

NOBODY = 65534


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * CONNECTIONS)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def held_metrics(daemon: Path) -> Iterator[list[socket.socket]]:
    """Silent readers, there from the first test to the last."""
    with _connections(metrics_socket(daemon), socket.SOCK_STREAM, 64) as found:
        yield found


def _count() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(CONNECTIONS, soft - 256)


def _pid(daemon: Path) -> int:
    return int((daemon / "lock").read_text())


def _fds(daemon: Path) -> int:
    return len(os.listdir(f"/proc/{_pid(daemon)}/fd"))


def _resident(daemon: Path) -> int:
    return int(Path(f"/proc/{_pid(daemon)}/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def _connections(path: Path, kind: socket.SocketKind, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(stack.enter_context(socket.socket(socket.AF_UNIX, kind)))
            found[-1].connect(str(path))
        yield found


@pytest.mark.parametrize("says", [b"", HTTP2], ids=["silent", "http2"])
def test_thousands_of_grpc_connections_leave_others_alone(daemon: Path, honest: Honest, says: bytes) -> None:
    fds, resident, count = _fds(daemon), _resident(daemon), _count()
    with _connections(grpc_socket(daemon), socket.SOCK_STREAM, count) as found:
        for each in found:
            each.send(says)
        waits = [honest.check() for _ in range(12)]
        grown = _resident(daemon) - resident
        with RawClient(daemon) as newcomer:
            assert newcomer.status().sessions
    print(f"beside {count}: evaluations {max(waits) * 1e3:.1f} ms at most, daemon grew {grown >> 20} MiB")
    assert grown < GROWTH
    wait_for(lambda: _fds(daemon) <= fds, CALL_S)


def test_thousands_of_silent_attach_connections_keep_nobody_out(daemon: Path, honest: Honest) -> None:
    fds, resident, count = _fds(daemon), _resident(daemon), _count()
    with _connections(attach_socket(daemon), socket.SOCK_SEQPACKET, count) as found:
        started = time.monotonic()
        with RawClient(daemon) as newcomer:
            assert newcomer.status().sessions
        attached = time.monotonic() - started
        waits = [honest.check() for _ in range(10)]
        assert _fds(daemon) <= fds + SILENT_LIMIT + 8
        assert _resident(daemon) - resident < GROWTH
        # All but the latest were hung up on already; those are when they have had their time.
        assert found[0].recv(1) == found[count // 2].recv(1) == b""
        found[-1].settimeout(REQUEST_TIMEOUT_S + CALL_S)
        assert found[-1].recv(1) == b""
        print(f"beside {count}: attached in {attached * 1e3:.0f} ms, {max(waits) * 1e3:.1f} ms at most")
    wait_for(lambda: _fds(daemon) <= fds, CALL_S)


def test_thousands_who_attach_are_answered_each(daemon: Path, honest: Honest) -> None:
    fds, count = _fds(daemon), _count()
    outcomes = {"accepted": 0, "QuotaExceeded": 0}
    waits = []
    with ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connect(connection, attach_socket(daemon), CALL_S)
            connection.send(attach_request(4096))
            # The arena's descriptor is not taken: it is closed with the packet.
            reply = attach_pb2.AttachReply.FromString(connection.recv(65536))
            outcomes[reply.refused.error or "accepted"] += 1
            if number % 100 == 0:
                waits.append(honest.check())
    print(f"{outcomes}, evaluations meanwhile {max(waits) * 1e3:.1f} ms at most")
    # session_limit, less the honest one.
    assert outcomes == {"accepted": 255, "QuotaExceeded": count - 255}
    wait_for(lambda: _fds(daemon) <= fds, CALL_S)


def test_silence_of_one_user_costs_another_nothing(daemon: Path, honest: Honest) -> None:
    if os.getuid():
        pytest.skip("needs root, to be two users")
    with ExitStack() as stack:
        stack.callback(daemon.chmod, daemon.stat().st_mode)
        daemon.chmod(0o711)
        attach_socket(daemon).chmod(0o666)
        mine = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        mine.connect(str(attach_socket(daemon)))
        code = (
            "import socket, sys\n"
            "kind = socket.AF_UNIX, socket.SOCK_SEQPACKET\n"
            "found = [socket.socket(*kind) for _ in range(int(sys.argv[2]))]\n"
            "for each in found: each.connect(sys.argv[1])\n"
            "print(found[0].recv(1), flush=True)\n"
        )
        others = subprocess.run(
            ["/usr/bin/env", "python3", "-c", code, str(attach_socket(daemon)), str(3 * SILENT_LIMIT)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            stdout=subprocess.PIPE,
            text=True,
            timeout=CALL_S,
            check=True,
        )
        # The oldest of all was mine, but not I had the most.
        assert others.stdout == "b''\n"
        mine.settimeout(CALL_S)
        mine.send(attach_request())
        assert attach_pb2.AttachReply.FromString(mine.recv(65536)).HasField("accepted")


def test_descriptors_that_nobody_asked_for_are_closed(daemon: Path, honest: Honest) -> None:
    fds = _fds(daemon)
    reading, writing = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writing] * 200))]
    attached = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    attached.settimeout(CALL_S)
    attached.connect(str(attach_socket(daemon)))
    attached.sendmsg([attach_request()], rights)
    assert attach_pb2.AttachReply.FromString(attached.recv(65536)).HasField("accepted")
    # Once more on a session, which that ends; and on the other socket.
    attached.sendmsg([b"more"], rights)
    assert attached.recv(1) == b""
    with _connections(grpc_socket(daemon), socket.SOCK_STREAM, 1) as [stream]:
        stream.sendmsg([HTTP2], rights)
        stream.settimeout(CALL_S)
        assert stream.recv(1)
        os.close(writing)
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            assert os.read(reading, 1) == b"", "somebody still holds the pipe"
        honest.check()
    wait_for(lambda: os.read(reading, 1) == b"", CALL_S)
    os.close(reading)
    attached.close()
    wait_for(lambda: _fds(daemon) <= fds, CALL_S)


def test_a_session_that_says_nothing_costs_a_session_and_no_more(daemon: Path, honest: Honest) -> None:
    with RawClient(daemon) as silent:
        for _ in range(5):
            honest.check()
        # It is as good as on its first moment.
        assert silent.status().sessions
        # Half of its connection gone is all of it gone.
        silent.connection.shutdown(socket.SHUT_WR)
        assert silent.connection.recv(1) == b""
        with pytest.raises(Refused) as caught:
            silent.status()
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_a_client_that_never_reads_its_answers_waits_alone(daemon: Path, honest: Honest) -> None:
    resident = _resident(daemon)
    with RawClient(daemon) as slow:
        request = _large_answer(slow)
        sent, waits = asyncio.run(_send_and_never_read(slow, request, honest))
        grown = _resident(daemon) - resident
        wait_for(lambda: _of(slow).requests == 0, CALL_S)
        answered = _of(slow).usage.pieces
    print(
        f"{sent} requests of {request.ByteSize()} bytes sent, {answered} pieces done, daemon grew "
        f"{grown >> 20} MiB, evaluations meanwhile {max(waits) * 1e3:.1f} ms at most"
    )
    assert grown < 64 << 20


def _large_answer(client: RawClient) -> pb.EvaluateRequest:
    """As many results as a request may ask for, of as little work each as there is."""

    context = client.open(SHAPE)
    client.append(context, 0, 0, random_rows(np.random.default_rng(0), SHAPE, TOKENS))
    item = pb.Evaluation(context_id=context, end_token=16, k=1, query=client.region(0, 2 * 64 * 4))
    item.ids.CopyFrom(client.region(4096, 8))
    assert client.arena is not None
    client.arena.view(0, (128,), np.float32)[:] = 1
    return pb.EvaluateRequest(query_heads=2, reduction=1, evaluations=[item] * 256)


async def _send_and_never_read(
    client: RawClient, request: pb.EvaluateRequest, honest: Honest
) -> tuple[int, list[float]]:
    async with grpc.aio.insecure_channel(client.accepted.grpc_address) as channel:
        method = channel.stream_stream(
            "/hillinfer.v1.ColdPool/Evaluate", request_serializer=pb.EvaluateRequest.SerializeToString
        )
        call = method(metadata=((TOKEN_KEY, client.token),))
        sent, waits = 0, []
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while True:
                    await call.write(request)
                    sent += 1
                    if sent % 10 == 0:
                        waits.append(await asyncio.to_thread(honest.check))
        call.cancel()
        return sent, waits


def _of(client: RawClient) -> pb.SessionStatus:
    [mine] = [each for each in client.status().sessions if each.session_id == client.accepted.session_id]
    return mine


def test_thousands_of_streams_that_say_nothing_leave_others_alone(daemon: Path, honest: Honest) -> None:
    resident = _resident(daemon)
    with RawClient(daemon, 0) as client:
        waits, grown = asyncio.run(_open_streams(client, honest, lambda: _resident(daemon) - resident))
    print(f"daemon grew {grown >> 20} MiB, evaluations meanwhile {max(waits) * 1e3:.1f} ms at most")
    assert grown < GROWTH


async def _open_streams(
    client: RawClient, honest: Honest, grown: Callable[[], int]
) -> tuple[list[float], int]:
    async with grpc.aio.insecure_channel(client.accepted.grpc_address) as channel:
        method = channel.stream_stream("/hillinfer.v1.ColdPool/Evaluate")
        calls = [method(metadata=((TOKEN_KEY, client.token),)) for _ in range(CONNECTIONS)]
        reads = [asyncio.create_task(call.read()) for call in calls]
        waits = [await asyncio.to_thread(honest.check) for _ in range(10)]
        found = grown()
        for each in reads:
            each.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
        return waits, found


def test_silent_readers_of_metrics_are_dropped(
    daemon: Path, honest: Honest, held_metrics: list[socket.socket]
) -> None:
    for each in held_metrics:
        each.settimeout(REQUEST_TIMEOUT_S + CALL_S)
        assert each.recv(1) == b""
    with _connections(metrics_socket(daemon), socket.SOCK_STREAM, 1) as [reader]:
        reader.settimeout(CALL_S)
        reader.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert reader.recv(15) == b"HTTP/1.1 200 OK"
