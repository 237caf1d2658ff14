"""Entry point of `hillinfer`: errors become one line on standard error and an exit code.

2: something in the command line cannot work. 1: the work failed.
"""

from __future__ import annotations

import os
import signal
import sys
from threading import Timer
from typing import TYPE_CHECKING

from hillinfer_core.errors import HillInferError, ResidentTooSmall

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

TERMINATED = 128 + signal.SIGTERM
"""Exit code, as shells tell it."""

STOP_AGAIN_S = 0.02
"""Time for a finaliser to end in. Our choice; where it does not, the next try follows."""

EXTRAS = {
    "matplotlib": "plots",
    "rich": "cli",
    "typer": "cli",
    "torch": "transformers",
    "transformers": "transformers",
    "tokenizers": "transformers",
}


def main() -> None:
    """Run the command line; always exits."""
    # OpenMP's spinning threads starve the daemon of a shared core; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # As ^C does, a time limit's signal ends private daemons in order, and takes their pools away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.unraisablehook = _stop_again
    try:
        from hillinfer.commands import app

        app(prog_name="hillinfer")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"{error.name} is not installed: pip install 'hillinfer[{extra}]'", 2)
    except HillInferError as error:
        bad_input = error.status == "INVALID_ARGUMENT" or isinstance(error, ResidentTooSmall)
        _fail(str(error), 2 if bad_input else 1)
    except OSError as error:  # a full disk, a directory that is not there
        if error.strerror is None:
            raise
        _fail(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1)


def _stop_again(lost: UnraisableHookArgs) -> None:
    """Repeat a signal that came in a finaliser or a callback, where Python drops what the handler raises."""
    stops = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    number = stops.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
        return
    again = Timer(STOP_AGAIN_S, os.kill, (os.getpid(), number))  # later: this still runs within the finaliser
    again.daemon = True
    again.start()


def _fail(message: str, code: int) -> None:
    print(f"hillinfer: {message}", file=sys.stderr)
    sys.exit(code)
