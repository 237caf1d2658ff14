import pytest
import torch

from hillinfer.private_daemon import PrivateDaemon


@pytest.fixture(scope="session")
def daemon():
    with PrivateDaemon(pool_capacity=1 << 30) as daemon:
        yield daemon


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # The daemon needs a core too, and OpenMP threads spin while they wait.
    torch.set_num_threads(1)
