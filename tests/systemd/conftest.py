"""test_service.py boots systemd: `make test-systemd` builds the package and sets HILLINFER_SYSTEMD."""

import os
from collections.abc import Iterator

import pytest
from systemd_machine import ROOT, Machine, booted, obstacle

collect_ignore = [] if os.environ.get("HILLINFER_SYSTEMD") else ["test_service.py"]


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """One machine for all tests, with the package installed and nothing started."""
    if reason := obstacle():
        pytest.skip(reason)
    packages = sorted((ROOT / "dist").glob("hillinfer_*.deb"), key=lambda path: path.stat().st_mtime)
    assert packages, "no package in dist; run make deb"
    with booted(packages[-1]) as machine:
        yield machine
