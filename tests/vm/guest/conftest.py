"""Modules of other suites that are used here too."""

import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("test_driver_contract", "rig", "write_log")
sys.path += [str(Path(__file__).parents[2] / name) for name in ("driver", "client")]
