"""Packed evaluations: what goes in comes out, and what is cut or too long is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.packed import (
    Evaluated,
    Item,
    Region,
    Request,
    Unpacker,
    ask_again,
    pack_answer,
    pack_request,
    pack_results,
    unpack_answer,
    unpack_request,
    unpack_results,
    with_tokens,
)

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
regions = st.builds(Region, u64, u64)
items = st.builds(Item, u64, u32, u32, u32, *[regions] * 7)
requests = st.builds(Request, u32, u32, st.integers(0, 255), u32, st.lists(items, max_size=4))
results = st.builds(
    Evaluated, u32, st.lists(u32, max_size=9), u32, u64, u64, st.floats(0, 100, allow_nan=False)
)


@given(requests, st.data())
def test_a_request_comes_out_as_it_went_in(request_, data):
    packed = pack_request(request_)
    assert unpack_request(bytes(packed)) == request_
    tokens = [(data.draw(u32), data.draw(u32)) for _ in request_.items]
    again = unpack_request(ask_again(packed, 7, tokens))
    assert again.layer == 7
    assert [(each.first_token, each.end_token) for each in again.items] == tokens
    for mine, before in zip(again.items, request_.items, strict=True):
        assert mine._replace(first_token=before.first_token, end_token=before.end_token) == before


@given(st.lists(requests, min_size=1, max_size=3), st.data())
def test_what_was_made_of_a_request_is_kept_for_its_repetitions_only(asked, data):
    made = []

    def make(request):
        made.append(request)
        return len(made) - 1

    unpacker = Unpacker(make)
    for _ in range(8):
        request_ = data.draw(st.sampled_from(asked))
        tokens = [(data.draw(u32), data.draw(u32)) for _ in request_.items]
        again = request_._replace(layer=data.draw(u32), items=with_tokens(request_.items, tokens))
        layer, of_items, number = unpacker.unpack(bytes(pack_request(again)))
        assert (layer, of_items) == (again.layer, tokens)
        # What was made is of this request, whatever its layer and tokens were then.
        kept = made[number]
        assert kept._replace(layer=again.layer, items=with_tokens(kept.items, tokens)) == again
    assert len(made) <= len(asked)


@given(requests.filter(lambda request_: request_.items), st.data())
def test_a_changed_byte_is_another_request_unless_it_is_of_layer_or_tokens(request_, data):
    packed = pack_request(request_)
    unpacker = Unpacker(lambda request: request)
    unpacker.unpack(bytes(packed))
    # Not the count of items: then its length is wrong.
    at = data.draw(st.integers(0, len(packed) - 1).filter(lambda each: each not in (8, 9)))
    packed[at] ^= data.draw(st.integers(1, 255))
    changed = unpack_request(bytes(packed))
    layer, tokens, kept = unpacker.unpack(bytes(packed))
    assert kept._replace(layer=layer, items=with_tokens(kept.items, tokens)) == changed


@given(st.lists(results, max_size=4), st.lists(results, max_size=4))
def test_results_come_out_as_they_went_in_also_joined(some, others):
    packed = pack_results(some) + pack_results(others)
    assert unpack_results(packed) == some + others
    assert unpack_answer(pack_answer(1.5, packed)) == (1.5, some + others)


@given(requests, st.integers(-200, 200).filter(bool))
def test_a_request_of_another_length_is_refused(request_, change):
    packed = bytes(pack_request(request_))
    changed = packed[:change] if change < 0 else packed + b"\1" * change
    with pytest.raises(InvalidInput, match="packed"):
        unpack_request(changed)


def test_results_that_are_cut_short():
    packed = pack_results([Evaluated(1, [2, 3], 4, 5, 6, 0.5)])
    for end in range(1, len(packed)):
        with pytest.raises(struct.error):
            unpack_results(packed[:end])
