"""How a text is cut into forward passes."""

from hypothesis import given
from hypothesis import strategies as st

from hillinfer.prefill import chunks


@given(st.integers(0, 500), st.integers(2, 60))
def test_chunks_are_the_text_in_order_and_none_is_a_decode_step(tokens, most):
    parts = list(chunks(tokens, most))
    assert [n for part in parts for n in range(tokens)[part]] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    assert all(size <= most + 1 for size in sizes)
    assert tokens == 1 or 1 not in sizes
