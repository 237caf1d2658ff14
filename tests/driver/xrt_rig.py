"""An xrt driver on a card that is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import fake_pyxrt
import numpy as np
from fake_pyxrt import CARDS, FakeCard
from xclbin_writer import Container, default_sections, ip_layout

from hillinfer_core import reference
from hillinfer_core.layout import TILE_TOKENS, Precision, tile_bytes
from hillinferd.driver.contract import KeySegment, Scan
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.xrt.driver import XrtDriver

BDF = "0000:65:00.1"
BOTH = ("evaluate_int8", "evaluate_int4")


class CheckedXrtDriver(XrtDriver):
    """Fails a test, when it is closed, that did to the card what one must not do."""

    def __init__(self, settings: DriverSettings) -> None:
        self.fake = CARDS[settings.card]
        super().__init__(settings)

    def close(self, failed: bool = False) -> None:
        super().close()
        if failed:
            return  # its traceback holds what it held
        assert self.fake.violations == [], self.fake.violations
        assert self.fake.allocated == 0, "memory of the card was not given back"


def write_bitstream(path: Path, kernels: tuple[str, ...] = BOTH, **container: object) -> Path:
    """Write a container with these kernels, which says that it is for the fake card's shell."""
    layout = ip_layout([f"{name}:evaluate_{number}" for number, name in enumerate(kernels, start=1)])
    sections = [(kind, name, layout if kind == 8 else data) for kind, name, data in default_sections()]
    path.write_bytes(Container(sections=sections, **container).build())
    return path


def other_uuid(number: int) -> UUID:
    return UUID(int=number)


def settings(directory: Path, **changes: object) -> DriverSettings:
    values = {
        "kind": "xrt",
        "path": str(directory / "pool"),
        "capacity": 8 << 20,
        "keep": False,
        "key_memory": 64 << 20,
        "card": BDF,
        "bitstream": str(directory / "both.xclbin"),
    }
    return DriverSettings(**{**values, **changes})


def plug(directory: Path, **card: object) -> FakeCard:
    """Put the card into the machine and its bitstream into ``directory``."""
    sys.modules["pyxrt"] = fake_pyxrt
    CARDS[BDF] = FakeCard(**card)
    write_bitstream(directory / "both.xclbin")
    return CARDS[BDF]


@contextmanager
def opened(directory: Path, changes: dict[str, object] | None = None, **card: object) -> Iterator[XrtDriver]:
    """Give a driver on a new card; closing it checks what the card has noted."""
    plug(directory, **card)
    driver = CheckedXrtDriver(settings(directory, **(changes or {})))
    try:
        yield driver
    except BaseException:
        driver.close(failed=True)
        raise
    driver.close()


def write_keys(
    driver: XrtDriver,
    lengths: list[int],
    precision: Precision,
    heads: int = 2,
    dim: int = 64,
    seed: int = 0,
    offset: int = 64 << 10,
) -> tuple[list[KeySegment], np.ndarray]:
    """Write segments of so many tokens to the pool; return them and all tiles as one array."""
    rng = np.random.default_rng(seed)
    segments, arrays, token = [], [], 0
    for tokens in lengths:
        tiles = rng.integers(
            0, 256, (heads, tokens // TILE_TOKENS, tile_bytes(dim, precision)), dtype=np.uint8
        )
        padded = -(-tiles.nbytes // 4096) * 4096
        page = fake_pyxrt.mmap.mmap(-1, padded)
        page[: tiles.nbytes] = tiles.tobytes()
        driver.write(offset, memoryview(page))
        sums = tuple(int(value) for value in reference.data_checksum(tiles))
        segments.append(KeySegment(offset, token, tokens, heads, dim, precision, sums))
        arrays.append(tiles)
        offset, token = offset + padded, token + tokens
    return segments, np.concatenate(arrays, axis=1)


def query(heads: int = 2, vectors: int = 1, dim: int = 64, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (heads, vectors, dim)).astype(np.int8)


def expected(tiles: np.ndarray, precision: Precision, scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Return what the reference finds."""
    scores = np.empty((tiles.shape[0], tiles.shape[1] * TILE_TOKENS), np.int32)
    reference.scores(tiles, scan.q, precision, scores)
    return reference.top_k(np.ascontiguousarray(scores[:, scan.first : scan.end]), scan.k, scan.first)
