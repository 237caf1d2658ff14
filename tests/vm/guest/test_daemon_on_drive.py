"""The whole daemon on a drive that fails, forgets, alters, goes away and loses power."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rig import Mapped, ask_host, bad_range, drive, flakey, linear, run, sectors, slow, wait_for, wipe
from serving import LABELS, SHAPE, TOKENS, UNIT, Daemon, best, check, fill, save, serving
from test_power_loss import recorded
from write_log import Replay

from hillinfer import Context, Session, errors
from hillinferd.driver.block import format_device
from hillinferd.driver.storage import Storage
from hillinferd.records import catalogue_path
from hillinferd.records.check import PoolReport
from hillinferd.records.check import check as fsck
from hillinferd.records.database import Database
from hillinferd.records.durable import DurableRecords

PLUG = Path("/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_hillinfer-plug")


def examine(pool: Path, catalogue: Path) -> PoolReport:
    storage, database = Storage(pool, 0, keep=True), Database(catalogue)
    try:
        return fsck(storage, DurableRecords(database))[0]
    finally:
        database.close()
        storage.close()


def until_served(daemon: Daemon, action: Callable[[Session], None]) -> None:
    """Do ``action`` in sessions of its own until the drive serves it."""

    def attempt() -> bool:
        try:
            with daemon.connect() as session:
                action(session)
        except errors.DeviceUnavailable:
            return False
        return True

    wait_for("the drive served again", attempt, 200)


def read_book(session: Session) -> None:
    check(session.open_context(SHAPE, base="book", labels=LABELS))


@pytest.fixture
def device() -> Iterator[Path]:
    path = drive("cold")
    wipe(path)
    yield path
    wipe(path)


@pytest.fixture
def mapped(device: Path) -> Iterator[Mapped]:
    with Mapped("faulty", linear(device)) as mapped:
        format_device(mapped.path)
        yield mapped


def test_a_saved_context_is_there_after_a_restart_of_the_daemon(device: Path, tmp_path: Path) -> None:
    run(".venv/bin/hillinferctl", "format", device, "--state-dir", tmp_path)
    with serving(device, tmp_path) as daemon, daemon.connect() as session:
        save(session, "book")
        context = session.open_context(SHAPE, base="book", labels=LABELS)
        ranking = best(context)
    report = examine(device, catalogue_path(device, tmp_path))
    assert report.clean
    assert len(report.contexts) == 1
    for flags in ((), ("--evaluation-keys-dram", "0")):
        with serving(device, tmp_path, *flags) as daemon, daemon.connect() as session:
            context = session.open_context(SHAPE, base="book", labels=LABELS)
            check(context)
            np.testing.assert_array_equal(best(context), ranking)


def test_a_drive_that_fails_for_a_while_costs_an_error_and_nothing_that_was_saved(
    mapped: Mapped, device: Path, tmp_path: Path
) -> None:
    with serving(mapped.path, tmp_path) as daemon:
        with daemon.connect() as session:
            save(session, "book")
            reader = session.open_context(SHAPE, base="book", labels=LABELS)
            writer = session.open_context(SHAPE, durable="draft", labels=LABELS)
            fill(writer, TOKENS // 2)
            mapped.load(flakey(device))
            for attempt in (lambda: check(reader), lambda: fill(writer)):
                with pytest.raises(errors.DeviceUnavailable):
                    attempt()
            mapped.load(linear(device))
        until_served(daemon, read_book)

        def go_on(session: Session) -> None:
            draft = session.open_context(SHAPE, durable="draft", labels=LABELS)
            assert draft.length(0) >= TOKENS // 2
            fill(draft)
            draft.save()
            check(draft)

        until_served(daemon, go_on)
    assert examine(mapped.path, catalogue_path(mapped.path, tmp_path)).clean


def test_a_bad_range_costs_the_contexts_in_it_and_no_other(
    mapped: Mapped, device: Path, tmp_path: Path
) -> None:
    with serving(mapped.path, tmp_path) as daemon, daemon.connect() as session:
        context = session.open_context(SHAPE)
        fill(context)
        other = session.open_context(SHAPE)
        fill(other)
        # The pool is filled from its start: this range has rows of the first context only.
        mapped.load(bad_range(device, 128 << 10, 4096))
        with pytest.raises(errors.DeviceUnavailable):
            check(context)
        check(other)
        mapped.load(linear(device))
        check(context)


def test_bytes_that_are_not_what_was_written_are_corrupt_data(
    mapped: Mapped, device: Path, tmp_path: Path
) -> None:
    with serving(mapped.path, tmp_path) as daemon, daemon.connect() as session:
        good = session.open_context(SHAPE)
        fill(good)
        for feature in ("drop_writes", "corrupt_bio_byte 700 w 77 0", "corrupt_bio_byte 700 r 77 0"):
            mapped.load(flakey(device, feature))
            bad = session.open_context(SHAPE)
            fill(bad)
            with pytest.raises(errors.CorruptData):
                check(bad)
            mapped.load(linear(device))
            check(good)
            bad.close()


def test_a_slow_drive_serves_what_it_should(mapped: Mapped, device: Path, tmp_path: Path) -> None:
    with serving(mapped.path, tmp_path) as daemon, daemon.connect() as session:
        mapped.load(slow(device, read_ms=20, write_ms=50))
        save(session, "book")
        read_book(session)


def test_a_drive_that_is_pulled_out_is_unavailable_and_serves_when_it_is_back(tmp_path: Path) -> None:
    ask_host("plug")
    wait_for("the drive appeared", PLUG.exists)
    try:
        format_device(PLUG, force=True)
        with serving(PLUG, tmp_path) as daemon:
            with daemon.connect() as session:
                save(session, "book")
                reader = session.open_context(SHAPE, base="book", labels=LABELS)
                check(reader)
                writer = session.open_context(SHAPE, durable="draft", labels=LABELS)
                ask_host("unplug")
                wait_for("the drive went away", lambda: not PLUG.exists())
                for attempt in (lambda: check(reader), lambda: fill(writer)):
                    with pytest.raises(errors.DeviceUnavailable):
                        attempt()
                wait_for("the drive was called gone", lambda: session.status().drives[0].state == "gone")
            pid = daemon.process.pid
            ask_host("plug")
            until_served(daemon, read_book)
            assert daemon.state == "serving"
            assert daemon.process.pid == pid
    finally:
        if PLUG.exists():
            ask_host("unplug")
            wait_for("the drive went away", lambda: not PLUG.exists())


def test_while_one_drive_is_gone_the_other_serves(device: Path, tmp_path: Path) -> None:
    ask_host("plug")
    wait_for("the drive appeared", PLUG.exists)
    try:
        config = tmp_path / "config.toml"
        config.write_text(
            f'[[drive]]\nname = "stays"\npool = "{device}"\n[[drive]]\nname = "goes"\npool = "{PLUG}"\n'
        )
        format_device(device)
        format_device(PLUG, force=True)
        with serving(None, tmp_path, "--config", str(config)) as daemon, daemon.connect() as session:
            # A context that is new goes to the emptiest drive, so two sessions fill one each.
            with daemon.connect() as second:
                contexts = []
                for each in (session, second):
                    contexts.append(each.open_context(SHAPE))
                    fill(contexts[-1])
                ask_host("unplug")
                wait_for("a drive was called gone", lambda: "gone" in _states(session))
                assert _states(session) == ["serving", "gone"]
                outcomes = [_outcome(context) for context in contexts]
                assert sorted(outcomes) == ["gone", "right"]
                third = session.open_context(SHAPE) if outcomes[0] == "right" else second.open_context(SHAPE)
                fill(third)
                check(third)
            ask_host("plug")
            wait_for("the drive served again", lambda: _states(session) == ["serving", "serving"], 120)
    finally:
        if PLUG.exists():
            ask_host("unplug")
            wait_for("the drive went away", lambda: not PLUG.exists())


def _states(session: Session) -> list[str]:
    return [each.state for each in session.status().drives]


def _outcome(context: Context) -> str:
    try:
        check(context)
    except errors.DeviceUnavailable:
        return "gone"
    return "right"


def test_no_acknowledged_token_is_lost_with_the_power(tmp_path: Path) -> None:
    cold, log, replay_drive = (drive(name) for name in ("cold", "log", "replay"))
    for each in (cold, log, replay_drive):
        wipe(each)
    copies: dict[str, tuple[Path, list[int]]] = {}
    with Mapped("logged", f"0 {sectors(cold)} log-writes {cold} {log}") as logged:
        format_device(logged.path)
        catalogue = catalogue_path(logged.path, tmp_path)
        with serving(logged.path, tmp_path) as daemon, daemon.connect() as session:

            def acknowledged(*contexts: Context) -> None:
                name = f"ack-{len(copies)}"
                logged.message(f"mark {name}")
                place = tmp_path / name
                place.mkdir()
                for file in tmp_path.glob(f"{catalogue.name}*"):
                    shutil.copy(file, place)
                copies[name] = place / catalogue.name, [context.flushed(0) for context in contexts]

            first = session.open_context(SHAPE, durable="first", labels=LABELS)
            second = session.open_context(SHAPE, durable="second", labels=LABELS)
            for step in range(1, 9):
                fill(first, step * 6 * UNIT)
                acknowledged(first)
                if step == 4:
                    fill(second)
                    second.save()
                    second.close()
                    acknowledged(first)
                if step == 6:
                    session.delete_context("second")
        entries = recorded(logged)
    replay, checked = Replay(replay_drive), 0
    for entry in entries:
        replay.apply(entry)
        if entry.mark in copies:
            replay.sync()
            file, tokens = copies[entry.mark]
            report = examine(replay_drive, file)
            assert report.clean, f"{entry.mark}: {report}"
            held = {context.name: context.tokens for context in report.contexts}
            assert held["first"] >= tokens[0], f"{entry.mark}: {held}"
            assert sum(context.rows for context in report.contexts) > 0
            checked += 1
    replay.close()
    wipe(cold)
    assert checked == len(copies) == 9
    print(f"{len(entries)} recorded requests, {checked} acknowledgements, every row of each there")
