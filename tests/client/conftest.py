"""A daemon for each test module, and a session for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hillinfer import PrivateDaemon, Session

POOL_CAPACITY = 128 << 20


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    with PrivateDaemon(pool_capacity=POOL_CAPACITY) as running:
        yield running


@pytest.fixture
def session(daemon: PrivateDaemon) -> Iterator[Session]:
    with Session.connect(daemon.socket, name="test", timeout_s=20) as connected:
        yield connected
