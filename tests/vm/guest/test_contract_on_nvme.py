"""The driver contract, as in tests/driver, on emulated NVMe drives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import test_driver_contract as contract
from rig import drive, wipe

from hillinferd.driver.block import format_device

driver = contract.driver


@pytest.fixture(params=["cold", "wide"])
def place(request: pytest.FixtureRequest) -> Iterator[contract.Place]:
    device = drive(request.param)
    wipe(device)
    format_device(device)
    yield contract.host(device)
    wipe(device)


for _name, _test in list(vars(contract).items()):
    if _name.startswith("test_") and {"place", "driver"} & set(inspect.signature(_test).parameters):
        globals()[_name] = _test
