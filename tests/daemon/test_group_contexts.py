"""Durable contexts that a group may read: the group may, its members change nothing, nobody else knows."""

from __future__ import annotations

import grp
import json
import pwd
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused
from service_thread import Served, drive_settings, served
from test_limits import ROWS, SHAPE
from typer.testing import CliRunner

from hillinfer_core.protocol import attach_socket
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.ctl import app
from hillinferd.records.database import Database
from hillinferd.service.limits import Limits
from hillinferd.service.sessions import Peer

# Every Debian has them; the first two are in one group, the third is not.
OWNER, MEMBER, STRANGER = (pwd.getpwnam(name).pw_uid for name in ("nobody", "sync", "games"))
GROUP = grp.getgrnam("nogroup").gr_gid
TOKENS = ROWS.shape[1]


def become(service: Served, client: RawClient, uid: int) -> None:
    """As if another user had attached: the kernel says who it is, so no test can."""

    def change() -> None:
        session = service.service.sessions.by_token(client.token)
        session.peer = Peer(session.peer.pid, uid)

    service.run(change)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, drive_settings("one", tmp_path / "pool")) as running:
        yield running


@pytest.fixture
def users(tmp_path: Path, service: Served) -> Iterator[tuple[RawClient, RawClient, RawClient]]:
    with RawClient(tmp_path) as owner, RawClient(tmp_path) as member, RawClient(tmp_path) as stranger:
        for client, uid in ((owner, OWNER), (member, MEMBER), (stranger, STRANGER)):
            become(service, client, uid)
        yield owner, member, stranger


def write(client: RawClient, name: str, gid: int | None) -> None:
    context = client.open_named(SHAPE, durable_name=name).context_id
    client.append(context, 0, 0, ROWS)
    client.call("SaveContext", pb.SaveContextRequest(context_id=context, gid=gid))
    client.close_context(context)


def refused(client: RawClient, name: str, **kind: int) -> str:
    with pytest.raises(Refused) as caught:
        client.open_named(SHAPE, base_name=name, **kind)
    return caught.value.error


def test_members_read_and_others_do_not_learn_of_it(users: tuple[RawClient, RawClient, RawClient]) -> None:
    owner, member, stranger = users
    write(owner, "shared", GROUP)
    write(owner, "own", None)
    assert set(owner.durable()) == {"shared", "own"}
    assert {name: (each.uid, each.gid) for name, each in member.durable().items()} == {
        "shared": (OWNER, GROUP)
    }
    assert not stranger.durable()
    for client, uid in ((owner, None), (owner, OWNER), (member, OWNER)):
        context = client.open_named(SHAPE, base_name="shared", base_uid=uid).context_id
        np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, TOKENS), ROWS)
        # What a reader appends is theirs.
        client.append(context, 0, TOKENS, ROWS)
        client.close_context(context)
    # Only by whose it is, so that nobody is given another's for their own.
    assert refused(member, "shared") == "UnknownContext"
    assert refused(member, "own", base_uid=OWNER) == "UnknownContext"
    for name in ("shared", "own", "none"):
        assert refused(stranger, name, base_uid=OWNER) == "UnknownContext"


def test_members_neither_change_nor_delete_it(users: tuple[RawClient, RawClient, RawClient]) -> None:
    owner, member, _ = users
    write(owner, "shared", GROUP)
    delete = pb.DeleteContextRequest(name="shared", uid=OWNER)
    with pytest.raises(Refused) as caught:
        member.call("DeleteContext", delete)
    assert caught.value.error == "NotAllowed"
    # The name is free for the member's own, which is another context.
    context = member.open_named(SHAPE, durable_name="shared")
    assert list(context.layer_tokens) == [0]
    member.append(context.context_id, 0, 0, -ROWS)
    reader = owner.open_named(SHAPE, base_name="shared").context_id
    np.testing.assert_array_equal(owner.fetch_range(reader, SHAPE, 0, 0, TOKENS), ROWS)
    owner.close_context(reader)
    owner.call("DeleteContext", delete)
    assert refused(member, "shared", base_uid=OWNER) == "UnknownContext"


def test_it_is_shared_with_groups_of_ones_own_only(users: tuple[RawClient, RawClient, RawClient]) -> None:
    _, member, stranger = users
    context = stranger.open_named(SHAPE, durable_name="gift").context_id
    stranger.append(context, 0, 0, ROWS)
    with pytest.raises(Refused) as caught:
        stranger.call("SaveContext", pb.SaveContextRequest(context_id=context, gid=GROUP))
    assert caught.value.error == "NotAllowed"
    assert not stranger.durable()["gift"].saved
    stranger.save(context)
    assert not member.durable()


def test_groups_are_looked_up_at_every_open(
    users: tuple[RawClient, RawClient, RawClient], service: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, member, _ = users
    write(owner, "shared", GROUP)
    member.open_named(SHAPE, base_name="shared", base_uid=OWNER)
    monkeypatch.setattr("hillinferd.service.limits._groups", lambda uid: [])
    assert refused(member, "shared", base_uid=OWNER) == "UnknownContext"
    assert not Limits().may_share(OWNER, GROUP)


def test_it_outlives_the_daemon_and_catalogues_of_before_are_read(tmp_path: Path) -> None:
    drive = drive_settings("one", tmp_path / "pool")
    with served(tmp_path, drive) as service, RawClient(tmp_path) as owner:
        become(service, owner, OWNER)
        write(owner, "shared", GROUP)
        before = owner.open_named(SHAPE, base_name="shared")
    with served(tmp_path, drive) as service, RawClient(tmp_path) as member:
        become(service, member, MEMBER)
        again = member.open_named(SHAPE, base_name="shared", base_uid=OWNER)
        assert (again.durable_id, again.content_checksum) == (before.durable_id, before.content_checksum)
        shown = CliRunner().invoke(
            app, ["contexts", "--socket", str(attach_socket(tmp_path))], env={"COLUMNS": "200"}
        )
        assert "nogroup" in shown.stdout
    assert drive.catalogue is not None
    database = Database(drive.catalogue)
    [(key, body)] = database.all("context")
    old = {name: value for name, value in json.loads(body).items() if name not in ("gid", "unique")}
    with database.transaction():
        database.put(key, json.dumps(old).encode())
    database.close()
    with (
        served(tmp_path, drive) as service,
        RawClient(tmp_path) as owner,
        RawClient(tmp_path) as member,
    ):
        become(service, owner, OWNER)
        become(service, member, MEMBER)
        assert not member.durable()
        assert refused(member, "shared", base_uid=OWNER) == "UnknownContext"
        context = owner.open_named(SHAPE, base_name="shared")
        np.testing.assert_array_equal(owner.fetch_range(context.context_id, SHAPE, 0, 0, TOKENS), ROWS)
        assert context.durable_id
