"""Man pages and shell completion of the installed commands, from their own options: `make man`.

    tools/manual.py DIRECTORY

writes DIRECTORY/man/*.1, *.5, *.8 and DIRECTORY/completions/{bash,zsh,fish}/*.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer.main

import hillinfer.commands
import hillinferd.ctl
import hillinferd.main
from hillinferd import __version__
from hillinferd.config import DRIVE_KEYS, KEYS
from hillinferd.config_key import Key

SECTIONS = {"hillinfer": 1, "hillinferctl": 8, "hillinferd": 8, "hillinferd.toml": 5}

COMPLETED = {
    "hillinfer": {"bash": "hillinfer", "zsh": "_hillinfer", "fish": "hillinfer.fish"},
    "hillinferctl": {"bash": "hillinferctl", "zsh": "_hillinferctl", "fish": "hillinferctl.fish"},
}

ENVIRONMENT = (
    "HILLINFER_RUNTIME_DIR",
    "directory of the daemon's sockets, before /run/hillinfer and that of the user",
)

FILES = (
    ("/run/hillinfer/attach.sock", "where clients attach"),
    ("/run/hillinfer/grpc.sock", "calls of attached clients; health checks and reflection for anyone"),
    ("/run/hillinfer/metrics.sock", "HTTP for Prometheus, at /metrics"),
    ("/etc/hillinfer/hillinferd.toml", "configuration of the daemon"),
)


def main(directory: Path) -> None:
    """Write everything below ``directory``."""
    pages = {
        "hillinfer": _command_page("hillinfer", hillinfer.commands.app, "long contexts with a cold pool"),
        "hillinferctl": _command_page("hillinferctl", hillinferd.ctl.app, "look after hillinferd"),
        "hillinferd": _command_page(
            "hillinferd", hillinferd.main.app, "serve the cold pool of long contexts"
        ),
        "hillinferd.toml": _configuration_page(),
    }
    man = directory / "man"
    man.mkdir(parents=True, exist_ok=True)
    for name, lines in pages.items():
        (man / f"{name}.{SECTIONS[name]}").write_text("\n".join(lines) + "\n")
    for program, files in COMPLETED.items():
        for shell, name in files.items():
            path = directory / "completions" / shell / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_completion(program, shell))


def _command_page(name: str, app: typer.Typer, purpose: str) -> list[str]:
    command: Any = typer.main.get_command(app)
    lines = [*_heading(name, purpose), ".SH SYNOPSIS", f".B {_text(name)}", _text(_usage(name, command))]
    lines += [".SH DESCRIPTION", _text(_prose(command))]
    if own := [param for param in command.params if _shown(param)]:
        lines += [".SH OPTIONS", *_options(name, command, own)]
    if children := list(_children(name, command)):
        lines.append(".SH COMMANDS")
        for path, child in children:
            lines += [f".SS {_text(path)} {_text(_usage(path, child))}".rstrip(), _text(_prose(child))]
            lines += _options(path, child, [param for param in child.params if _shown(param)])
    lines += [".SH EXIT STATUS", "0, or 1 if the work failed, or 2 if the command line cannot work."]
    lines += [".SH ENVIRONMENT", *_item(f"\\fB{ENVIRONMENT[0]}\\fR", ENVIRONMENT[1])]
    lines.append(".SH FILES")
    for path, say in FILES:
        lines += _item(f"\\fI{_text(path)}\\fR", say)
    return [*lines, *_see_also(name)]


def _configuration_page() -> list[str]:
    name = "hillinferd.toml"
    lines = [*_heading(name, "configuration of hillinferd"), ".SH DESCRIPTION"]
    lines.append(
        _text(
            "A TOML file that hillinferd reads with --config. Options of the command line come before it. "
            "Sizes are bytes, or text with a unit such as 64GiB; times are seconds. A key that is not known "
            "is an error."
        )
    )
    lines += [".SH KEYS", *_keys(KEYS)]
    lines += [".SH KEYS OF A DRIVE", "Those of the only drive stand at the top of the file; several drives"]
    lines += [_text("have a [[drive]] table each."), *_keys(DRIVE_KEYS)]
    lines += [".SH EXAMPLE", ".nf", 'pool = "/var/lib/hillinfer/pool"', 'pool_capacity = "200GiB"']
    lines += ['evaluation_keys_dram = "4GiB"', 'user_quota = "100GiB"', ".fi"]
    return [*lines, *_see_also(name)]


def _keys(keys: tuple[Key, ...]) -> Iterator[str]:
    for key in keys:
        yield from _item(f"\\fB{_text(key.name)}\\fR", f"{_sentence(key.help)} Give {key.allowed}.")


def _heading(name: str, purpose: str) -> list[str]:
    # A package build names its date, so that it can be repeated.
    moment = datetime.fromtimestamp(float(os.environ.get("SOURCE_DATE_EPOCH") or time.time()), UTC)
    title = f'.TH {_text(name.upper())} {SECTIONS[name]} "{moment:%Y-%m-%d}" "HillInfer {__version__}"'
    return [title, ".SH NAME", f"{_text(name)} \\- {_text(purpose)}"]


def _see_also(name: str) -> list[str]:
    others = [(other, section) for other, section in SECTIONS.items() if other != name]
    refs = [f".BR {_text(other)} ({section})" for other, section in others]
    return [".SH SEE ALSO", *(f"{ref} ," for ref in refs[:-1]), refs[-1]]


def _children(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if child.hidden:
            continue
        below = f"{path} {name}"
        if not hasattr(child, "commands") or child.invoke_without_command:
            yield below, child
        yield from _children(below, child)


def _usage(path: str, command: Any) -> str:
    return " ".join(command.collect_usage_pieces(_context(path, command)))


def _context(path: str, command: Any) -> Any:
    return command.context_class(command, info_name=path)


def _prose(command: Any) -> str:
    return _sentence(" ".join((command.help or "").split()))


def _shown(param: Any) -> bool:
    return not getattr(param, "hidden", False) and bool(getattr(param, "help", ""))


def _options(path: str, command: Any, params: list[Any]) -> Iterator[str]:
    context = _context(path, command)
    for param in params:
        record = param.get_help_record(context)
        if record:
            yield from _item(f"\\fB{_text(record[0])}\\fR", _sentence(record[1]))


def _item(name: str, say: str) -> list[str]:
    return [".TP", name, _text(say)]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if not text or text.endswith(".") else f"{text}."


def _text(text: str) -> str:
    """Escape for roff: backslashes, hyphens that are typed, and what a line must not begin with."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def _completion(program: str, shell: str) -> str:
    variable = f"_{program.upper()}_COMPLETE"
    done = subprocess.run(
        [Path(sys.executable).with_name(program)],
        env={**os.environ, variable: f"source_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        raise SystemExit(f"{program} prints no completion for {shell}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
