"""A daemon that can be started again and keeps a context, for each module; a session that waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from restartable import Restartable
from restarting import with_book

from hillinfer import Session


@pytest.fixture(scope="module")
def daemon() -> Iterator[Restartable]:
    with with_book() as running:
        yield running


@pytest.fixture
def session(daemon: Restartable) -> Iterator[Session]:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20) as connected:
        yield connected
