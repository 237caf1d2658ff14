"""A pyxrt without a card: put it into ``sys.modules["pyxrt"]``, and cards into :data:`CARDS`.

Names, argument checks and exceptions are those of XRT 2022.1's binding. What would harm a machine with a real
card (reading memory that was never written, a view that outlives its buffer, results taken before a run has
ended, another bitstream while kernels of the last are open) is noted in :attr:`FakeCard.violations`, which a
test must find empty. Memory of the card and of the host are two copies, so that a missing sync shows as wrong
bytes. The kernel is ``hillinfer_core.reference``.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import numpy as np
from xclbin_writer import SHELL

from hillinfer_core import reference
from hillinfer_core.layout import Precision, tile_bytes
from hillinferd.cec.xclbin import HEADER, PREFIX, parse_xclbin

GROUP = 5
NONE = UUID(int=0)
WORD = 64
KERNELS = {
    "evaluate_int8": (Precision.int8, np.int8),
    "evaluate_int4": (Precision.int4, np.int8),
    "evaluate_int8_q16": (Precision.int8, np.int16),
}
BUFFERS, SCALARS = 5, 9
_GARBAGE = np.random.default_rng(99).integers(1, 256, 1 << 16, np.uint8)


@dataclass
class FakeCard:
    """A card, what is wrong with it, and what was done to it that one must not do."""

    shell: UUID = SHELL
    name: str = "xilinx_u2_gen3x4_xdma_gc_base_2"
    memory: int = 4 << 30
    p2p: bool = True
    # Faults.
    open_error: str = ""
    load_error: str = ""
    gone: bool = False
    offline: bool = False
    slow: int = 0
    hang: bool = False
    end_state: int = 4
    reports: UUID | None = None
    sync_error: bool = False
    torn: str = ""
    miscomputing: set[UUID] = field(default_factory=set)
    flipped_bits: int = 0
    # What happened.
    loaded: UUID = NONE
    kernels: tuple[str, ...] = ()
    loads: list[str] = field(default_factory=list)
    open_kernels: int = 0
    allocated: int = 0
    most_allocated: int = 0
    runs: int = 0
    most_in_flight: int = 0
    violations: list[str] = field(default_factory=list)
    flight: deque = field(default_factory=deque)
    syncs: list[str] = field(default_factory=list)

    def alive(self) -> None:
        if self.gone:
            raise RuntimeError("ioctl failed: No such device")


CARDS: dict[str, FakeCard] = {}

ert_cmd_state = enum.IntEnum(
    "ert_cmd_state",
    {
        "ERT_CMD_STATE_NEW": 1,
        "ERT_CMD_STATE_QUEUED": 2,
        "ERT_CMD_STATE_COMPLETED": 4,
        "ERT_CMD_STATE_ERROR": 5,
        "ERT_CMD_STATE_ABORT": 6,
        "ERT_CMD_STATE_SUBMITTED": 7,
        "ERT_CMD_STATE_TIMEOUT": 8,
        "ERT_CMD_STATE_NORESPONSE": 9,
    },
)


class xclBOSyncDirection(enum.Enum):  # noqa: N801 -- the names are pyxrt's, here and below
    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


class xrt_info_device(enum.Enum):  # noqa: N801
    bdf = 0
    interface_uuid = 1
    name = 5
    offline = 7


class uuid:  # noqa: N801
    def __init__(self, text: str) -> None:
        self._text = str(UUID(text))

    def to_string(self) -> str:
        return self._text


class xclbin:  # noqa: N801
    """As trusting as the vendor's: a file with the right magic and any uuid will do."""

    def __init__(self, filename: str) -> None:
        try:
            self.data = Path(filename).read_bytes()
        except OSError:
            raise RuntimeError(f"failed to open file {filename}") from None
        if self.data[:8] != b"xclbin2\0":
            raise RuntimeError("invalid xclbin: bad magic")
        if len(self.data) < PREFIX.size + HEADER.size:
            raise RuntimeError("invalid xclbin: too short")
        header = HEADER.unpack_from(self.data, PREFIX.size)
        self.interface, self.own = UUID(bytes=header[8]), UUID(bytes=header[10])

    def get_uuid(self) -> uuid:
        return uuid(str(self.own))


class device:  # noqa: N801
    def __init__(self, which: str | int) -> None:
        if not isinstance(which, (str, int)):
            raise TypeError("__init__(): incompatible constructor arguments")
        bdf = list(CARDS)[which] if isinstance(which, int) and which < len(CARDS) else which
        if bdf not in CARDS:
            raise RuntimeError(f"Could not open device with index or bdf '{which}'")
        self.card = CARDS[bdf]
        self.bdf = bdf
        if self.card.open_error:
            raise RuntimeError(self.card.open_error)
        self.card.alive()

    def load_xclbin(self, what: str | xclbin) -> uuid:
        card = self.card
        card.alive()
        loading = xclbin(what) if isinstance(what, str) else what
        if card.load_error:
            raise RuntimeError(card.load_error)
        if loading.interface != card.shell:
            raise RuntimeError("interface uuid mismatch")
        if card.allocated:
            card.violations.append("a bitstream was loaded while buffers were in use")
        if card.open_kernels:
            card.violations.append("a bitstream was loaded while kernels of the last were open")
        card.loads.append(str(loading.own))
        card.loaded = loading.own
        try:
            card.kernels = tuple(name.partition(":")[0] for name in parse_xclbin(loading.data).kernels)
        except Exception:
            card.kernels = ()
        return loading.get_uuid()

    def get_xclbin_uuid(self) -> uuid:
        self.card.alive()
        return uuid(str(self.card.reports or self.card.loaded))

    def get_info(self, key: xrt_info_device) -> str:
        if not isinstance(key, xrt_info_device):
            raise TypeError("get_info(): incompatible function arguments")
        self.card.alive()
        return {
            xrt_info_device.bdf: self.bdf,
            xrt_info_device.interface_uuid: str(self.card.shell),
            xrt_info_device.name: self.card.name,
            xrt_info_device.offline: str(int(self.card.offline)),
        }[key]


class kernel:  # noqa: N801
    class cu_access_mode(enum.Enum):  # noqa: N801
        exclusive = 0
        shared = 1

    def __init__(
        self, of: device, loaded: uuid, name: str, mode: cu_access_mode = cu_access_mode.shared
    ) -> None:
        if not (isinstance(of, device) and isinstance(loaded, uuid) and isinstance(name, str)):
            raise TypeError("__init__(): incompatible constructor arguments")
        of.card.alive()
        if loaded.to_string() != of.get_xclbin_uuid().to_string():
            raise RuntimeError("xclbin uuid mismatch")
        if name.partition(":")[0] not in of.card.kernels:
            raise RuntimeError(f"No such kernel '{name}'")
        self.device, self.name = of, name
        of.card.open_kernels += 1

    def __del__(self) -> None:
        if hasattr(self, "name"):
            self.device.card.open_kernels -= 1

    def group_id(self, argument: int) -> int:
        if not 0 <= argument < BUFFERS:
            raise IndexError(f"no memory group for argument {argument}")
        return GROUP

    def __call__(self, *arguments: object) -> run:
        started = run(self)
        for index, argument in enumerate(arguments):
            with contextlib.suppress(Exception):  # in silence, as the binding does
                started.set_arg(index, argument)
        started.start()
        return started


class bo:  # noqa: N801
    class flags(enum.Enum):  # noqa: N801
        normal = 0
        cacheable = 1
        device_only = 2
        host_only = 3
        p2p = 4
        svm = 5

    def __init__(self, of: device, size: int, flags: flags, group: int) -> None:
        self._closed = True
        if not (isinstance(of, device) and type(size) is int and isinstance(flags, bo.flags)):
            raise TypeError("__init__(): incompatible constructor arguments")
        card = of.card
        card.alive()
        if group != GROUP:
            raise IndexError(f"invalid memory group {group}")
        if size <= 0:
            raise RuntimeError("invalid buffer size")
        if flags is bo.flags.p2p and not card.p2p:
            raise RuntimeError("failed to allocate p2p buffer: Operation not supported")
        if card.allocated + size > card.memory:
            raise MemoryError("bad alloc")
        self.card, self.flags = card, flags
        self._size = size
        self._closed = False
        self._memory = mmap.mmap(-1, size)
        self._clean = False
        card.allocated += size
        card.most_allocated = max(card.most_allocated, card.allocated)
        host = np.frombuffer(self._memory, np.uint8)
        host[:] = garbage(size)
        # Of a P2P buffer the mapping is the card's memory itself.
        self.on_card = host if self.p2p else garbage(size)

    @property
    def p2p(self) -> bool:
        return self.flags is bo.flags.p2p

    def size(self) -> int:
        return self._size

    def address(self) -> int:
        return 0x1000

    def map(self) -> memoryview:
        if self.flags is bo.flags.device_only:
            raise RuntimeError("cannot map a device only buffer")
        return memoryview(self._memory)

    def write(self, data: bytes, seek: int) -> None:
        self._within(len(data), seek)
        self._memory[seek : seek + len(data)] = bytes(data)

    def read(self, size: int, skip: int) -> np.ndarray:
        self._within(size, skip)
        return np.frombuffer(self._memory[skip : skip + size], np.int8)

    def sync(self, direction: xclBOSyncDirection, size: int, offset: int) -> None:
        if not isinstance(direction, xclBOSyncDirection):
            raise TypeError("sync(): incompatible function arguments")
        self.card.alive()
        self._within(size, offset)
        if self.card.sync_error:
            raise RuntimeError("sync failed: Input/output error")
        self.card.syncs.append(direction.name)
        if self.p2p:
            return
        host = np.frombuffer(self._memory, np.uint8)[offset : offset + size]
        if direction is xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE:
            self.on_card[offset : offset + size] = host
        else:
            self.check_written()
            host[:] = self.on_card[offset : offset + size]

    def check_written(self) -> None:
        """Every word must have been written once: bursts read beyond what a kernel asks for."""
        if not self._clean:
            words = self._size // WORD * WORD
            same = (self.on_card[:words] == garbage(self._size)[:words]).reshape(-1, WORD).all(axis=1)
            if same.any():
                self.card.violations.append(f"ECC: {same.sum()} words were read that nothing had written")
            self._clean = not same.any()

    def _within(self, size: int, offset: int) -> None:
        if size < 0 or offset < 0 or offset + size > self._size:
            raise RuntimeError(f"out of bounds: {size} bytes at {offset} of {self._size}")

    def __del__(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.card.allocated -= self._size
        del self.on_card
        try:
            self._memory.close()
        except BufferError:
            self.card.violations.append("a view outlives its buffer: touching it ends a real process")


class run:  # noqa: N801
    def __init__(self, of: kernel) -> None:
        if not isinstance(of, kernel):
            raise TypeError("__init__(): incompatible constructor arguments")
        self.kernel, self.card = of, of.device.card
        self.card.alive()
        self._arguments: dict[int, bo | int] = {}
        self._state = 1
        self._polls = 0

    def set_arg(self, index: int, argument: bo | int) -> None:
        if type(index) is not int or not (isinstance(argument, bo) or type(argument) is int):
            raise TypeError("set_arg(): incompatible function arguments")
        if isinstance(argument, int) and not -(1 << 31) <= argument < 1 << 31:
            raise TypeError("set_arg(): incompatible function arguments: not an int32")
        if not 0 <= index < BUFFERS + SCALARS:
            raise IndexError(f"no argument {index}")
        if isinstance(argument, bo) != (index < BUFFERS):
            raise RuntimeError(f"argument {index} is of the other kind")
        self._arguments[index] = argument

    def start(self) -> None:
        self.card.alive()
        if self._state in (3, 7):
            raise RuntimeError("the run is in flight already")
        self.card.runs += 1
        self.card.flight.append(self)
        self.card.most_in_flight = max(self.card.most_in_flight, len(self.card.flight))
        self._state, self._polls = 7, 0

    def wait(self, milliseconds: int = 0) -> int:
        # It ignored its limit and froze the process: no test may depend on it.
        self.card.violations.append("run.wait was called")
        return self._state

    def state(self) -> ert_cmd_state | int:
        self.card.alive()
        if self._state in (3, 7):
            self._advance()
        return ert_cmd_state(self._state) if self._state != 3 else 3

    def _advance(self) -> None:
        self._polls += 1
        first = self.card.flight[0]
        if self._polls == 1:
            return
        if self._polls <= 2 + self.card.slow or self.card.hang:
            self._state = 3
            return
        # One after the other: all that were started before this one end first.
        while True:
            first = self.card.flight.popleft()
            first._state = self.card.end_state
            if self.card.end_state == 4:
                first._execute()
            # As the real one may, it keeps its buffers no longer than it runs.
            first._arguments = {}
            if first is self:
                return

    def _execute(self) -> None:
        if len(self._arguments) != BUFFERS + SCALARS:
            self.card.violations.append("a run was started without all of its arguments")
            return
        buffers = [self._arguments[i] for i in range(BUFFERS)]
        scalars = [self._arguments[i] & 0xFFFFFFFF for i in range(BUFFERS, BUFFERS + SCALARS)]
        for buffer in buffers:
            buffer.check_written()
        if self.card.flipped_bits:
            self.card.flipped_bits -= 1
            buffers[0].on_card[3] ^= 16
        evaluate(self.card, self.kernel.name, *(buffer.on_card for buffer in buffers), *scalars)


def evaluate(
    card: FakeCard, name: str, keys: np.ndarray, queries: np.ndarray, blocks: np.ndarray,
    histograms: np.ndarray, summaries: np.ndarray, heads: int, key_stride: int, tiles: int, begin: int,
    end: int, dim: int, vectors: int, k: int, first_id: int,
) -> None:  # fmt: skip
    """Do what hls/evaluate.hpp says the kernel does."""
    precision, dtype = KERNELS[name]
    if (
        heads == 0 or tiles > 8192 or end <= begin or end > tiles * 16 or dim == 0 or dim > 256 or dim % 8
        or vectors == 0 or vectors > 8 or k == 0
    ):  # fmt: skip
        summaries[:WORD] = np.frombuffer((1).to_bytes(WORD, "little"), np.uint8)
        return
    size = tiles * tile_bytes(dim, precision)
    held = np.stack([keys[head * key_stride * WORD :][:size] for head in range(heads)])
    held = held.reshape(heads, tiles, tile_bytes(dim, precision))
    in_word = WORD // np.dtype(dtype).itemsize
    padded = -(-dim // in_word) * in_word
    head_bytes = WORD + vectors * padded * np.dtype(dtype).itemsize
    words = queries[: heads * head_bytes].reshape(heads, head_bytes)
    offsets = words[:, : vectors * 4].copy().view("<i4")
    q = words[:, WORD:].copy().view(dtype).reshape(heads, vectors, padded)[:, :, :dim]
    levels = reference.from_tiles(held, precision).astype(np.int64)
    products = np.einsum("htd,hrd->htr", levels, q.astype(np.int64)) + offsets[:, None, :]
    scores = products.max(axis=2).astype(np.int32)
    scores = np.ascontiguousarray(scores[:, begin:end])
    if card.loaded in card.miscomputing:
        scores[0, 0] += 1
    ids, best = reference.top_k(scores, k, first_id + begin)
    pairs = np.empty((heads, -(-ids.shape[1] // 8) * 8, 2), "<u4")
    pairs[:] = (0xFFFFFFFF, 0x80000000)
    pairs[:, : ids.shape[1]] = np.stack((ids, best.view(np.uint32)), axis=2)
    low, shift = reference.score_range(q, precision, offsets=offsets)
    words = np.zeros((heads, 16), "<u4")
    words[:, 1] = ids.shape[1]
    words[:, 2] = reference.data_checksum(held)
    words[:, 3], words[:, 4], words[:, 5] = low.view(np.uint32), shift, best.min(axis=1).view(np.uint32)
    counts = reference.histogram(scores, q, precision, offsets=offsets).astype("<u4")
    half = pairs.nbytes // 2 if card.torn == "blocks" else pairs.nbytes
    blocks[:half] = pairs.reshape(-1).view(np.uint8)[:half]
    histograms[: counts.nbytes] = counts.reshape(-1).view(np.uint8)
    if card.torn != "summaries":
        summaries[: words.nbytes] = words.reshape(-1).view(np.uint8)


def garbage(size: int) -> np.ndarray:
    """What memory holds that nothing has written."""
    return np.resize(_GARBAGE, size)
