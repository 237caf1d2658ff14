"""Set before anything imports torch: idle OpenMP threads must sleep, the daemon needs the cores too.

With HILLINFER_REQUIRE_ALL set, a test that skips fails, unless it is the processor that lacks something.

hypothesis tries the same examples in each run, so that a failure is of the change and not of chance; others
with `--hypothesis-profile=exploring`, as `make test-long` has it.
"""

import os
from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("exploring", derandomize=False)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_LONG_FILES_FIRST = ("hls",)
"""Directories whose files would have one worker go on alone if they came last."""

_MAY_SKIP = "Skipped: this processor"

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in _LONG_FILES_FIRST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _required((yield))


def _required(report: Report) -> Report:
    # An expected failure is reported as skipped too, but with another kind of longrepr.
    if os.environ.get("HILLINFER_REQUIRE_ALL") and report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if not reason.startswith(_MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: {reason}; HILLINFER_REQUIRE_ALL allows no skip"
    return report
