import pytest

from hillinfer.private_daemon import PrivateDaemon


@pytest.fixture(scope="session")
def daemon():
    with PrivateDaemon(pool_capacity=1 << 30) as daemon:
        yield daemon
