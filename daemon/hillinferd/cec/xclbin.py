"""A strict reader of xclbin containers (magic ``xclbin2``), which the vendor's runtime trusts too much.

Layout, little-endian, from the public header xclbin.h of XRT: 304 bytes of magic, signature length, key block
and unique id; a header of 152 bytes; a table of section headers of 40 bytes; the sections, each on a
multiple of 8. Tools append a textual copy of the metadata between two markers. All else is refused: a
bitstream that is turned away costs a build, a wrong one that is loaded can take the host down.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from hillinfer_core.errors import BadBitstream

MAGIC = b"xclbin2\0"
LARGEST_FILE = 256 << 20
"""Bytes of the largest file that is read; a full configuration of the KU15P is about 36 MB. Our choice."""
LARGEST_TABLE = 256
"""Most sections accepted; about 36 kinds exist. Our choice (XRT itself allows 65,536)."""

PREFIX = struct.Struct("<8si28s256sQ")
# magic, signature length (-1: unsigned), reserved, key block, unique id
HEADER = struct.Struct("<QQQHBBHH16s64s16s16sI4x")
# length, time, feature ROM time, patch, major, minor, mode, actions, interface uuid, platform, uuid, debug,
# number of sections
SECTION = struct.Struct("<I16s4xQQ")
# kind, name, offset, size
_IP_COUNT = struct.Struct("<i4x")
_IP = struct.Struct("<IIQ64s")
# type, properties, base address, name

ALIGNMENT = 8
BITSTREAM, MEM_TOPOLOGY, CONNECTIVITY, IP_LAYOUT, CLOCK_FREQ_TOPOLOGY, PARTITION_METADATA = 0, 6, 7, 8, 11, 20
LARGEST_KIND = 63
"""Section kinds above this are taken for garbage; XRT of 2025 ends at 35. Our choice."""
_ONCE = (BITSTREAM, MEM_TOPOLOGY, CONNECTIVITY, IP_LAYOUT, CLOCK_FREQ_TOPOLOGY, PARTITION_METADATA)
_IP_KERNEL = 1
_IP_LARGEST_TYPE = 31
MODES = ("flat", "pr", "tandem", "tandem_pr", "hw_emu", "sw_emu", "hw_emu_pr")
HARDWARE_MODES = ("flat", "pr")
MIRROR_START, MIRROR_END = b"XCLBIN_MIRROR_DATA_START", b"XCLBIN_MIRROR_DATA_END"


@dataclass(frozen=True)
class Section:
    """One section: its kind, its name, and where in the file it lies, in bytes."""

    kind: int
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Xclbin:
    """What a container says of itself. ``kernels`` names kernel instances, ``sha256`` is of the file."""

    uuid: UUID
    interface_uuid: UUID
    platform: str
    version: tuple[int, int, int]
    mode: str
    sections: tuple[Section, ...]
    kernels: tuple[str, ...]
    sha256: str

    @property
    def for_hardware(self) -> bool:
        """Whether it configures a card, rather than an emulator."""
        return self.mode in HARDWARE_MODES


def read_xclbin(path: Path) -> Xclbin:
    """Read and check the file; blocks for as long as the reading takes.

    Raises :class:`BadBitstream` if it cannot be read or is malformed in any way.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise BadBitstream(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse_xclbin(data)
    except BadBitstream as error:
        raise BadBitstream(f"{path} is not a usable xclbin: {error}; build it again") from None


def parse_xclbin(data: bytes) -> Xclbin:
    """Return what ``data``, a whole file, says; raises :class:`BadBitstream` with the first fault."""
    _require(len(data) <= LARGEST_FILE, f"more than {LARGEST_FILE} bytes")
    _require(len(data) >= PREFIX.size + HEADER.size, f"{len(data)} bytes are too few for a header")
    magic, signature_length, _, _, _ = PREFIX.unpack_from(data)
    _require(magic == MAGIC, "its magic is not xclbin2")
    _require(signature_length == -1, "it is signed, and nothing here verifies signatures")
    (length, _, _, patch, major, minor, mode, _, interface, platform, own, _, count) = HEADER.unpack_from(
        data, PREFIX.size
    )
    _require(length == len(data), f"its header says {length} bytes, the file has {len(data)}")
    _require(mode < len(MODES), f"mode {mode} is unknown")
    _require(1 <= count <= LARGEST_TABLE, f"{count} sections")
    _require(any(own), "its uuid is zero")
    _require(any(interface), "its interface uuid is zero: it names no shell")
    sections = _sections(data, count)
    return Xclbin(
        uuid=UUID(bytes=own),
        interface_uuid=UUID(bytes=interface),
        platform=_text(platform, "platform"),
        version=(major, minor, patch),
        mode=MODES[mode],
        sections=sections,
        kernels=_kernels(data, sections),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _sections(data: bytes, count: int) -> tuple[Section, ...]:
    table = PREFIX.size + HEADER.size
    end = table + count * SECTION.size
    _require(end <= len(data), f"its table of {count} sections passes the end")
    sections = []
    for index in range(count):
        kind, name, offset, size = SECTION.unpack_from(data, table + index * SECTION.size)
        _require(kind <= LARGEST_KIND, f"section {index} has the unknown kind {kind}")
        # Python's integers do not wrap, so the sum is safe to compare.
        _require(end <= offset and offset + size <= len(data), f"section {index} lies outside the file")
        _require(offset % ALIGNMENT == 0, f"section {index} is not aligned")
        sections.append(Section(kind, _text(name, f"name of section {index}"), offset, size))
    _no_overlap(data, sections, end)
    for kind in _ONCE:
        _require(sum(section.kind == kind for section in sections) <= 1, f"two sections of kind {kind}")
    bitstreams = [section for section in sections if section.kind == BITSTREAM]
    _require(bool(bitstreams) and bitstreams[0].size > 0, "no bitstream in it")
    return tuple(sections)


def _no_overlap(data: bytes, sections: list[Section], end: int) -> None:
    for section in sorted(sections, key=lambda section: (section.offset, section.size)):
        _require(section.offset >= end, "two of its sections overlap")
        # Between sections there is only padding: nothing may hide there.
        gap = data[end : section.offset]
        _require(len(gap) < ALIGNMENT and not any(gap), f"unaccounted bytes at {end}")
        end = section.offset + section.size
    rest = data[end:].lstrip(b"\0")
    mirrored = rest.startswith(MIRROR_START) and rest.rstrip(b"\0").endswith(MIRROR_END)
    padding = len(data) - end - len(rest)
    _require(padding < ALIGNMENT and (not rest or mirrored), f"unaccounted bytes at {end}")


def _kernels(data: bytes, sections: tuple[Section, ...]) -> tuple[str, ...]:
    layout = next((section for section in sections if section.kind == IP_LAYOUT), None)
    _require(layout is not None, "no IP layout in it: it has no kernel")
    assert layout is not None
    _require(layout.size >= _IP_COUNT.size, "its IP layout is cut short")
    (count,) = _IP_COUNT.unpack_from(data, layout.offset)
    _require(1 <= count <= LARGEST_TABLE, f"its IP layout counts {count} entries")
    needed = _IP_COUNT.size + count * _IP.size
    _require(
        needed <= layout.size < needed + ALIGNMENT,
        f"its IP layout of {count} entries has {layout.size} bytes",
    )
    kernels = []
    for index in range(count):
        kind, _, _, name = _IP.unpack_from(data, layout.offset + _IP_COUNT.size + index * _IP.size)
        _require(kind <= _IP_LARGEST_TYPE, f"IP {index} has the unknown type {kind}")
        if kind == _IP_KERNEL:
            kernels.append(_text(name, f"name of IP {index}"))
    _require(bool(kernels) and all(kernels), "its IP layout names no kernel")
    _require(len(set(kernels)) == len(kernels), "two of its kernels have one name")
    return tuple(kernels)


def _text(field: bytes, what: str) -> str:
    text, _, rest = field.partition(b"\0")
    _require(not any(rest), f"the {what} has bytes after its end")
    _require(all(0x20 <= byte < 0x7F for byte in text), f"the {what} is not printable ASCII")
    return text.decode("ascii")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise BadBitstream(fault)
