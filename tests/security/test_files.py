"""What lies in the file system: nobody else can read it, replace it, or be led to another's."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_udev_gives_drives_to_the_service_and_not_to_those_who_may_attach() -> None:
    rules = [line for line in (ROOT / "systemd/udev.rules").read_text().splitlines() if "MODE=" in line]
    assert len(rules) == 2
    for rule in rules:
        assert 'OWNER="hillinfer", GROUP="root", MODE="0600"' in rule
