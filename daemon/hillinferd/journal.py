"""Log records as entries of systemd's journal, with their facts as fields and a MESSAGE_ID for events."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

EVENTS = {
    "ready": "cb74481e00b742d888472f41089ecbec",
    "stopping": "3f96999184a24ddb80f3170333944ca5",
    "configuration reloaded": "528bc69d1d2c4793b70316306d573bd2",
    "configuration not reloaded": "a4bdd03a40644a40a472784fd0eee178",
    "device worker died": "c179dcb8b33748c8b22002d97368e7e5",
    "device worker hangs, killing it": "d137489d98b644fe9f9b9fa52743c918",
    "device worker restarted": "40f00f97e1314bc4a992a30c9a068f07",
    "drive is gone": "e17115c573b3491fa4f4c7600b43e106",
    "contexts lost with the device worker": "050cdf7d330c4b77b212d35d4ca56df2",
    "the watchdog is not fed": "abc3ba37de5b4124b66f8cf348801563",
}
"""MESSAGE_ID of what an operator may want to find or be told of; never changed once published."""

_PREFIX = "HILLINFER_"


def connected() -> bool:
    """Whether standard error of this process leads to the journal, and systemd-python is there to use it."""
    try:
        status = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") != f"{status.st_dev}:{status.st_ino}":
            return False
        importlib.import_module("systemd.journal")
    except (ImportError, OSError, ValueError):
        return False
    return True


class JournalHandler(logging.Handler):
    """Sends records to the journal; the formatter makes the text, the facts become fields as well."""

    def __init__(self) -> None:
        super().__init__()
        self._journal = importlib.import_module("systemd.journal")

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; never raises."""
        try:
            self._journal.send(self.format(record), **fields(record))
        except Exception:
            self.handleError(record)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of an entry beside its text: ``HILLINFER_`` and the name for each fact."""
    facts: Mapping[str, object] = getattr(record, "facts", {})
    entry: dict[str, Any] = {_PREFIX + name.upper(): str(value) for name, value in facts.items()}
    entry["PRIORITY"] = _priority(record.levelno)
    entry["SYSLOG_IDENTIFIER"] = "hillinferd"
    entry |= {"CODE_FILE": record.pathname, "CODE_LINE": record.lineno, "CODE_FUNC": record.funcName}
    if event := EVENTS.get(record.getMessage()):
        entry["MESSAGE_ID"] = event
    return entry


def _priority(level: int) -> int:
    # syslog(3): 3 error, 4 warning, 6 informational, 7 debug.
    for least, priority in ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return priority
    return 7
