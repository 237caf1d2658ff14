"""A daemon that is attacked, and an honest session beside that must always get the right answer."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "daemon"))

from honest import Honest
from raw_client import RawClient, log_of, running_daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[Path]:
    """The runtime directory of a daemon that the tests of a module attack; it must have met no surprise."""
    directory = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))
    try:
        flags = ("--pool", str(directory / "pool"), "--pool-capacity", "1GiB")
        with running_daemon(directory, *flags) as process:
            yield directory
            assert process.poll() is None, log_of(directory)
        assert "Traceback" not in log_of(directory), log_of(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def honest(daemon: Path) -> Iterator[Honest]:
    """Somebody else's session: right before the attack and after it, on the same worker."""
    with Honest(daemon) as other:
        other.check()
        yield other
        other.check()
        assert other.restarts() == 0


@pytest.fixture
def attacker(daemon: Path) -> Iterator[RawClient]:
    with RawClient(daemon) as client:
        yield client
