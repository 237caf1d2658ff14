"""Bitstreams of a card as messages of the Admin service."""

from __future__ import annotations

from hillinfer_core.v1 import admin_pb2

from .catalogue import Entry
from .loader import Status


def to_message(drive: str, card: str, status: Status, contexts: int) -> admin_pb2.CecCard:
    """Return the message for the card of ``drive`` at PCI address ``card``, which ``contexts`` need."""
    return admin_pb2.CecCard(
        drive=drive,
        card=card,
        interface_uuids=[str(uuid) for uuid in status.interface_uuids],
        loaded_uuid=str(status.loaded or ""),
        good_loaded=status.good_loaded,
        good=_bitstream(status.good) if status.good else None,
        previous=_bitstream(status.previous) if status.previous else None,
        catalogue=[_bitstream(entry) for entry in status.catalogue],
        contexts=contexts,
    )


def _bitstream(entry: Entry) -> admin_pb2.Bitstream:
    return admin_pb2.Bitstream(
        file=entry.file,
        sha256=entry.sha256,
        kernel=entry.kernel.name,
        precision=entry.precision.to_proto(),  # type: ignore[arg-type]
        head_dims=entry.head_dims,
        interface_uuid=str(entry.interface_uuid),
    )
