"""A daemon that many connect to at once is waited for, and not for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hillinfer_core.attach_socket import connect


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    """A socket that listens and takes in nobody more."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
            waiting.connect(str(path))
            yield listening, path


def test_it_ends_with_the_timeout(full: tuple[socket.socket, Path]) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late,
        pytest.raises(TimeoutError, match="takes in no connection"),
    ):
        connect(late, full[1], 0.02)


def test_it_ends_with_the_next_that_is_taken_in(full: tuple[socket.socket, Path]) -> None:
    listening, path = full
    thread = threading.Timer(0.05, listening.accept)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        thread.start()
        connect(late, path, 20)
        assert late.gettimeout() == 20
    thread.join()
