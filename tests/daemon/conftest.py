from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_client import RawClient, running_daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[Path]:
    """The runtime directory of a daemon that the tests of a module share."""
    with _short_directory() as directory, running_daemon(directory):
        yield directory


@pytest.fixture
def client(daemon: Path) -> Iterator[RawClient]:
    with RawClient(daemon) as session:
        yield session


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory for a daemon of the test's own, short enough for a socket's path."""
    with _short_directory() as directory:
        yield directory


class _short_directory:  # noqa: N801
    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix="hd-", dir="/tmp"))
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
