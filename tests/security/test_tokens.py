"""Tokens that are guessed, foreign or used again, and names of what belongs to another user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from honest import SHAPE, TOKENS, Honest
from raw_client import CALL_S, RawClient, Refused, log_of, random_rows, wait_for
from service_thread import Served, drive_settings, served

from hillinfer_core.protocol import ERROR_KEY, TOKEN_KEY
from hillinfer_core.v1 import admin_pb2, admin_pb2_grpc
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.service.sessions import Peer, Session

ROWS = random_rows(np.random.default_rng(1), SHAPE, TOKENS)
MALLORY = 424242


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), dict(refused.value.trailing_metadata()).get(ERROR_KEY, "")


REQUESTS = {
    "OpenContext": pb.OpenContextRequest(layers=1, kv_heads=1, head_dim=64, dtype=1, precision=1),
    "Evaluate": pb.EvaluateRequest(reduction=1),
    "Fetch": pb.FetchRequest(tail=pb.Tail()),
}
"""Of those methods that look at anything before the token."""

FOREIGN = (grpc.StatusCode.UNAUTHENTICATED, "ForeignToken")


def test_tokens_are_long_never_the_same_and_never_logged(daemon: Path, honest: Honest) -> None:
    tokens = set()
    for _ in range(100):
        with RawClient(daemon, 0) as client:
            tokens.add(client.token)
    assert len(tokens) == 100
    # 32 bytes of the kernel's randomness, six bits a character.
    assert {len(token) for token in tokens} == {43}
    for place in range(43):
        assert len({token[place] for token in tokens}) > 2
    log = log_of(daemon)
    assert not any(token in log for token in tokens)


def test_what_is_like_a_token_opens_nothing(daemon: Path, attacker: RawClient, honest: Honest) -> None:
    token = attacker.token
    guesses: list[tuple[tuple[str, str | bytes], ...]] = [
        (),
        *(
            ((TOKEN_KEY, guess),)
            for guess in ("", " ", token[:-1], token + "=", token.swapcase(), token[::-1])
        ),
        (("hillinfer-token-bin", token.encode()),),
        (("x-" + TOKEN_KEY, token),),
        (("authorization", token),),
        # Of several the last counts, and nobody else's.
        ((TOKEN_KEY, token), (TOKEN_KEY, "x" * 43)),
    ]
    for file in (pb, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                call = attacker.channel.stream_stream(f"/{service.full_name}/{method.name}")
                request = REQUESTS.get(method.name, pb.StatusRequest()).SerializeToString()
                for metadata in guesses:
                    answers = call(iter([request]), timeout=CALL_S, metadata=metadata)
                    assert _refusal(partial(next, answers)) == FOREIGN, (method.name, metadata)


def test_a_token_ends_with_its_attach_connection_on_every_other(
    daemon: Path, attacker: RawClient, honest: Honest
) -> None:
    victim = RawClient(daemon)
    context = victim.open(SHAPE)
    victim.append(context, 0, 0, ROWS)
    metadata = ((TOKEN_KEY, victim.token),)
    # Whoever has the token is the session while it lasts, also on a stream that is open when it ends.
    sent = iter([pb.EvaluateRequest(reduction=1)])
    attacker.stub.Status(pb.StatusRequest(), metadata=metadata, timeout=CALL_S)

    def requests() -> Iterator[pb.EvaluateRequest]:
        victim.connection.close()
        wait_for(lambda: _is_gone(attacker, metadata), CALL_S)
        yield from sent

    stream = attacker.stub.Evaluate(requests(), metadata=metadata, timeout=CALL_S)
    assert _refusal(lambda: next(stream)) == FOREIGN
    close = pb.CloseContextRequest(context_id=context)
    assert _refusal(lambda: attacker.stub.CloseContext(close, metadata=metadata, timeout=CALL_S)) == FOREIGN
    victim.channel.close()


def _is_gone(client: RawClient, metadata: tuple[tuple[str, str], ...]) -> bool:
    try:
        client.stub.Status(pb.StatusRequest(), metadata=metadata, timeout=CALL_S)
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


VICTIM = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from raw_client import RawClient
client = RawClient(Path(sys.argv[1]))
print(client.token, flush=True)
sys.stdin.read()
"""


def test_a_token_ends_with_the_process_that_attached(
    daemon: Path, attacker: RawClient, honest: Honest
) -> None:
    here = str(Path(__file__).parents[1] / "daemon")
    command = [sys.executable, "-c", VICTIM, str(daemon), here]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        metadata = ((TOKEN_KEY, victim.stdout.readline().strip()),)
        attacker.stub.Status(pb.StatusRequest(), metadata=metadata, timeout=CALL_S)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    wait_for(lambda: _is_gone(attacker, metadata), CALL_S)


def test_contexts_and_regions_of_another_session_do_not_exist(daemon: Path, attacker: RawClient) -> None:
    with RawClient(daemon) as victim:
        context = victim.open(SHAPE)
        victim.append(context, 0, 0, ROWS)
        for attempt in (
            lambda: attacker.append(context, 0, TOKENS, ROWS),
            lambda: attacker.fetch_range(context, SHAPE, 0, 0, 16),
            lambda: attacker.fetch_ids(context, SHAPE, 0, [[0], [0]]),
            lambda: attacker.evaluate(context, SHAPE, 0, np.ones((2, 64), np.float32), 4, 0, 64),
            lambda: attacker.save(context),
            lambda: attacker.close_context(context),
        ):
            with pytest.raises(Refused) as caught:
                attempt()
            assert (caught.value.error, caught.value.code) == ("UnknownContext", grpc.StatusCode.NOT_FOUND)
        mine = attacker.open(SHAPE)
        # A region of theirs, by the generation that names their arena.
        region = pb.Region(offset=0, length=ROWS.nbytes, generation=victim.accepted.arena_generation)
        with pytest.raises(Refused, match="generation"):
            attacker.call("Append", pb.AppendRequest(context_id=mine, tokens=TOKENS, rows=region))
        np.testing.assert_array_equal(victim.fetch_range(context, SHAPE, 0, 0, TOKENS), ROWS)


@pytest.fixture
def two_users(tmp_path: Path) -> Iterator[tuple[RawClient, RawClient]]:
    """A session of this user with a saved context "diary", and one of another user without any."""
    with (
        served(tmp_path, drive_settings("one", tmp_path / "pool")) as service,
        RawClient(tmp_path) as mine,
        RawClient(tmp_path) as theirs,
    ):
        context = mine.open_named(SHAPE, durable_name="diary").context_id
        mine.append(context, 0, 0, ROWS)
        mine.save(context)
        mine.close_context(context)
        _become(service, theirs, MALLORY)
        yield mine, theirs


def _become(service: Served, client: RawClient, uid: int) -> None:
    """As if another user had attached: the kernel says who it is, so no test can."""

    def change() -> Session:
        session = service.service.sessions.by_token(client.token)
        session.peer = Peer(session.peer.pid, uid)
        return session

    service.run(change)


def test_another_users_context_has_no_name_for_me(two_users: tuple[RawClient, RawClient]) -> None:
    mine, theirs = two_users
    with pytest.raises(Refused) as caught:
        theirs.open_named(SHAPE, base_name="diary")
    assert (caught.value.error, caught.value.code) == ("UnknownContext", grpc.StatusCode.NOT_FOUND)
    assert not theirs.durable()
    with pytest.raises(Refused) as caught:
        theirs.delete("diary")
    assert (caught.value.error, caught.value.code) == ("NotAllowed", grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(Refused) as caught:
        theirs.call("DeleteContext", pb.DeleteContextRequest(name="diary", uid=MALLORY))
    assert caught.value.error == "UnknownContext"

    # Their own of the same name is another one.
    other = theirs.open_named(SHAPE, durable_name="diary").context_id
    theirs.append(other, 0, 0, -ROWS)
    reader = mine.open_named(SHAPE, base_name="diary").context_id
    np.testing.assert_array_equal(mine.fetch_range(reader, SHAPE, 0, 0, TOKENS), ROWS)
    assert os.getuid() == 0 or set(mine.durable()) == {"diary"}


def test_another_user_may_not_administer_by_any_call(two_users: tuple[RawClient, RawClient]) -> None:
    mine, theirs = two_users
    stub = admin_pb2_grpc.AdminStub(theirs.channel)
    for name, request in (
        ("Drain", admin_pb2.DrainRequest(on=True)),
        ("CloseSession", admin_pb2.CloseSessionRequest(session_id=mine.accepted.session_id)),
        ("CecLoad", admin_pb2.CecLoadRequest(name="x")),
        ("CecRollback", admin_pb2.CecRollbackRequest()),
    ):
        call = partial(getattr(stub, name), request, timeout=CALL_S, metadata=((TOKEN_KEY, theirs.token),))
        found = _refusal(call)
        assert found == (grpc.StatusCode.PERMISSION_DENIED, "NotAllowed"), name
    assert mine.status().draining is False
