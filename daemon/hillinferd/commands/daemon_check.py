"""Whether a daemon answers, and whether its drives serve; a check of ``hillinferctl doctor``."""

from __future__ import annotations

from pathlib import Path

from hillinfer_core.errors import DaemonUnavailable, HillInferError
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

from ..doctor.model import Check, Verdict
from .connection import connected

NAME = "daemon"


def look_at_daemon(socket: Path | None) -> tuple[Check, Path | None]:
    """Ask the daemon; return the check, and where its first drive's pool is, None if it does not say."""
    try:
        with connected(socket) as (channel, call):
            status = call(ColdPoolStub(channel).Status, pb.StatusRequest())  # type: ignore[no-untyped-call]
    except DaemonUnavailable as error:
        return Check(NAME, Verdict.WARNING, "no daemon answers", str(error)), None
    except HillInferError as error:
        return Check(NAME, Verdict.FAILED, "the daemon refuses to answer", str(error)), None
    pool = Path(status.device.path) if status.device.path else None
    return _verdict(status), pool


def _verdict(status: pb.StatusResponse) -> Check:
    away = [drive for drive in status.drives if drive.state != "serving"]
    serving, drives = len(status.drives) - len(away), len(status.drives)
    found = f"hillinferd {status.version} answers; {serving} of {drives} drives serve"
    if away:
        reasons = "; ".join(
            f"{drive.name} is {drive.state}: {drive.reason or 'its worker died'}" for drive in away
        )
        remedy = f"{reasons}; the daemon tries again by itself, and its log says more"
        return Check(NAME, Verdict.WARNING if serving else Verdict.FAILED, found, remedy)
    if status.draining:
        return Check(NAME, Verdict.WARNING, f"{found}, but it drains", "end this with hillinferctl undrain")
    return Check(NAME, Verdict.OK, found, "")
