"""Writes xclbin containers for the tests, from the layout alone: it shares no code with the reader."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, field

OWN = uuid.UUID("d081de98-3fd3-4e9b-bab3-108b42c73101")
SHELL = uuid.UUID("862c7020-a250-293e-3203-6f19956669e5")
TABLE = 456
ENTRY = 40


def ip_layout(names: list[str], kinds: list[int] | None = None) -> bytes:
    kinds = kinds or [1] * len(names)
    entries = (
        struct.pack("<IIQ", kind, 0, 0x1000 * number) + name.encode().ljust(64, b"\0")
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True))
    )
    return struct.pack("<i", len(names)) + bytes(4) + b"".join(entries)


def default_sections() -> list[tuple[int, str, bytes]]:
    return [
        (0, "primary", bytes(range(1, 252))),
        (6, "mem", b"\1" * 44),
        (8, "ip", ip_layout(["evaluate_int4:evaluate_int4_1"])),
        (2, "xml", b"<xml/>"),
    ]


@dataclass
class Container:
    """A container; ``build`` lays it out."""

    own: uuid.UUID = OWN
    interface: uuid.UUID = SHELL
    platform: str = "xilinx_u2_gen3x4_xdma_gc_2_202110_1"
    mode: int = 1
    mirror: bytes = b""
    sections: list[tuple[int, str, bytes]] = field(default_factory=default_sections)

    def build(self) -> bytes:
        end = TABLE + ENTRY * len(self.sections)
        table, body = b"", b""
        for kind, name, content in self.sections:
            body += bytes(-(end + len(body)) % 8)
            table += struct.pack("<I", kind) + name.encode().ljust(16, b"\0") + bytes(4)
            table += struct.pack("<QQ", end + len(body), len(content))
            body += content
        if self.mirror:
            body += b"XCLBIN_MIRROR_DATA_START" + self.mirror + b"XCLBIN_MIRROR_DATA_END"
        head = b"xclbin2\0" + struct.pack("<i", -1) + b"\xff" * 28 + bytes(256) + struct.pack("<Q", 77)
        head += struct.pack("<QQQHBBHH", end + len(body), 1_700_000_000, 0, 436, 2, 13, self.mode, 0)
        head += self.interface.bytes + self.platform.encode().ljust(64, b"\0") + self.own.bytes + bytes(16)
        head += struct.pack("<I", len(self.sections)) + bytes(4)
        assert len(head) == TABLE
        return head + table + body
