"""Sizes and budgets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.units import Budget, format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0), (4096, 4096), ("4096", 4096), ("12B", 12), ("64MiB", 64 << 20), ("64 mib", 64 << 20),
        ("1.5GiB", 3 << 29), ("10MB", 10**7), ("2kb", 2000), (" 1TiB ", 1 << 40),
        ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1e3", "64M iB", "64MiBs", "nan", "1,5GiB", -1, True, 1.5, None]
)
def test_what_is_not_a_size(text):
    with pytest.raises(InvalidInput):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1024**2 - 1, "1.0 MiB"),
     (64 << 20, "64.0 MiB"), (1 << 50, "1024.0 TiB")],
)  # fmt: skip
def test_formatted_sizes(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(0, 1 << 50))
def test_a_formatted_size_parses_back_to_about_itself(nbytes):
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= max(nbytes * 0.05, 0)


@pytest.mark.parametrize(
    ("text", "past", "tokens"),
    [("2%", 4096, 82), ("100%", 4096, 4096), ("0.5%", 1000, 5), ("7%", 100, 7), ("2%", 0, 0), ("2%", 1, 1),
     ("256", 4096, 256), (256, 100, 100), (" 12.5 % ", 8, 1), (Budget(tokens=3), 9, 3)],
)  # fmt: skip
def test_budgets(text, past, tokens):
    assert parse_budget(text).of(past) == tokens


@pytest.mark.parametrize(
    "text", ["", "%", "0%", "101%", "-2%", "2.5", "0", 0, -3, "two", "1e2%", True, None, 0.02]
)
def test_what_is_not_a_budget(text):
    with pytest.raises(InvalidInput):
        parse_budget(text)


def test_budgets_print_as_they_are_written():
    assert [str(parse_budget(text)) for text in ("2%", "0.5%", "256")] == ["2%", "0.5%", "256"]


@pytest.mark.parametrize("fields", [{}, {"tokens": 1, "alpha": 0.5}])
def test_a_budget_is_one_or_the_other(fields):
    with pytest.raises(InvalidInput):
        Budget(**fields)


@given(st.floats(0.001, 1.0), st.integers(0, 1 << 20))
def test_a_budget_stays_within_the_past(alpha, past):
    assert 0 <= Budget(alpha=alpha).of(past) <= past
