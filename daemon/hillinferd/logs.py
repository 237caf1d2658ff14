"""Log lines, on standard error or in the journal: time, level, message, then facts as key=value."""

from __future__ import annotations

import logging
import sys
import time

from . import journal

LEVELS = ("debug", "info", "warning", "error")


class Logger:
    """A logger whose keyword arguments are the facts of the line."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, message: str, **facts: object) -> None:
        """Log what only a developer wants to see."""
        self._logger.debug(message, extra={"facts": facts}, stacklevel=2)

    def info(self, message: str, **facts: object) -> None:
        """Log an ordinary event."""
        self._logger.info(message, extra={"facts": facts}, stacklevel=2)

    def warning(self, message: str, **facts: object) -> None:
        """Log what works, but not as well as it should."""
        self._logger.warning(message, extra={"facts": facts}, stacklevel=2)

    def error(self, message: str, **facts: object) -> None:
        """Log what failed."""
        self._logger.error(message, extra={"facts": facts}, stacklevel=2)

    def exception(self, message: str, error: BaseException | None = None, /, **facts: object) -> None:
        """Log a failure that should not happen, with the traceback of ``error``, or of the one handled."""
        self._logger.error(message, exc_info=error or True, extra={"facts": facts}, stacklevel=2)


def get_logger(name: str) -> Logger:
    """Return the logger of a module."""
    return Logger(logging.getLogger(name))


def set_up(level: str) -> None:
    """Send the lines of this process to standard error from ``level``, one of :data:`LEVELS`, upwards.

    Where standard error is the journal, each becomes an entry with fields; see :mod:`hillinferd.journal`.
    """
    handler: logging.Handler
    if journal.connected():
        handler = journal.JournalHandler()
        handler.setFormatter(_Text())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)


def set_level(level: str) -> None:
    """Log from ``level`` upwards from now on."""
    logging.getLogger().setLevel(level.upper())
    # It logs every event-loop start; nothing there is about this daemon.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLogger().level))


class _Text(logging.Formatter):
    """Message and facts: the journal keeps time and level itself."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, object] = getattr(record, "facts", {})
        line = record.getMessage()
        for key, value in facts.items():
            line += f" {key}={_quoted(str(value))}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Line(_Text):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        return f"{moment}.{int(record.msecs):03d} {record.levelname.lower():7} {super().format(record)}"


def _quoted(text: str) -> str:
    return text if text and text.isprintable() and not set(text) & set(' "=') else repr(text)
