"""``hillinferctl``: wiring of its commands."""

from __future__ import annotations

import sys

import typer

from hillinfer_core.errors import HillInferError

from .commands import administer, cec, contexts, devices, pool, sessions
from .commands.status import status

app = typer.Typer(
    no_args_is_help=True,
    help="Ask a running hillinferd, look after its drives and cards, or plan for a card.",
)
app.command()(status)
app.command()(sessions.sessions)
app.command()(sessions.top)
app.add_typer(contexts.app, name="contexts")
app.command("format")(pool.format_command)
app.command()(pool.fsck)
app.command()(administer.drain)
app.command()(administer.undrain)
app.command()(administer.close)
app.add_typer(devices.app)
app.add_typer(cec.app, name="cec")


def main() -> None:
    """Run ``hillinferctl``; an error that says what to do ends it with one line and exit code 1."""
    try:
        app()
    except HillInferError as error:
        print(f"hillinferctl: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
