from __future__ import annotations

import os
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


@pytest.fixture
def foreign(runtime_dir: Path) -> Iterator[tuple[Path, list[str]]]:
    """A directory with mode 0, and how to begin a command that has no more rights to it than that says."""
    path = runtime_dir / "foreign"
    path.mkdir()
    prefix = []
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        # Still root, so that the interpreter can be read wherever it is.
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    path.chmod(0)
    yield path, prefix
    path.chmod(0o700)


class _short_directory:  # noqa: N801
    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix="hd-", dir="/tmp"))
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
