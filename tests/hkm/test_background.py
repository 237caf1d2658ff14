"""Reading ahead and appending behind: in order, nothing lost, nothing in silence."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from hillinfer.hkm.background import Background


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_the_next_read_is_under_way_while_one_is_used(executor):
    begun = [threading.Event() for _ in range(3)]

    def read(number):
        begun[number].set()
        return number

    results = Background(executor).ahead([partial(read, number) for number in range(3)])
    assert begun[0].wait(10)
    assert not begun[1].is_set()
    used = []
    for number in results:
        assert number == 2 or begun[number + 1].wait(10)
        used.append(number)
    assert used == [0, 1, 2]
    assert list(Background(executor).ahead([])) == []


def test_a_read_sees_the_append_before_it_and_errors_come_out(executor):
    background, held = Background(executor), []
    background.append(lambda: held.append(1))
    assert list(background.ahead([lambda: list(held)])) == [[1]]
    background.settle()

    def fail():
        raise ValueError("full")

    go = threading.Event()
    background.append(lambda: go.wait(10) and None)
    background.append(fail)
    background.append(lambda: held.append(2))
    go.set()
    with pytest.raises(ValueError, match="full"):
        background.settle()
    background.settle()
    with pytest.raises(ValueError, match="full"):
        list(background.ahead([fail, lambda: held.append(3)]))
    executor.submit(lambda: None).result()
    assert 3 not in held
