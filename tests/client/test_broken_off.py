"""A call that the daemon breaks off, as it does when it stops: a daemon that went away, whatever the code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hillinfer import errors, wire
from hillinfer_core.v1 import cold_pool_pb2, cold_pool_pb2_grpc


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_call_broken_off_is_a_daemon_that_went_away(tmp_path: Path, code: grpc.StatusCode) -> None:
    class Stopping(cold_pool_pb2_grpc.ColdPoolServicer):
        def Status(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
            context.abort(code, "")

    server = grpc.server(ThreadPoolExecutor(1))
    cold_pool_pb2_grpc.add_ColdPoolServicer_to_server(Stopping(), server)
    address = f"unix:{tmp_path}/grpc.sock"
    server.add_insecure_port(address)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            cold_pool_pb2_grpc.ColdPoolStub(channel).Status(cold_pool_pb2.StatusRequest(), timeout=20)
    finally:
        server.stop(None).wait()
    assert caught.value.code() is code
    assert isinstance(wire.typed_error(caught.value, "Status"), errors.DaemonUnavailable)
    # The daemon may have been at the call: what it shares is not to be used again before it is gone.
    assert not wire.answered(caught.value)
