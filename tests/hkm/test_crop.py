"""Rolling a cache back: it goes on as one that never saw what was dropped."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_models import COMMON
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hillinfer
from hillinfer.hkm.slots import EMPTY
from hillinfer.private_daemon import PrivateDaemon
from hillinfer_core.errors import InvalidInput, PoolFull, UnsupportedModel

ARENA = 1 << 20
CONFIG = COMMON | {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 4096}


def llama(seed=7):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def sliding(seed=7):
    """Its first layer slides: it stays in memory."""
    torch.manual_seed(seed)
    kinds = ["sliding_attention", "full_attention"]
    config = Qwen3Config(**CONFIG, use_sliding_window=True, sliding_window=64, layer_types=kinds)
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with PrivateDaemon(pool_capacity=256 << 20, pool_dir=tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="crop") as session:
        yield session
        for each in session.list_contexts():
            session.delete_context(each.name)


def tokens(count, seed=0, batch=1):
    return torch.randint(1, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


def step(model, cache, ids, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


TOKEN_BYTES = 160
"""Evaluation keys, checksums and whatever else must be held for a token of these models, rounded up."""

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(2, 150)),
        st.tuples(st.just("decode"), st.integers(1, 6)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("crop"), st.integers(0, 400)),
    ),
    min_size=3,
    max_size=9,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, padding=st.sampled_from([None, 9, 70]), resident=st.sampled_from([160, 4096]))
@example(operations=[("read", 44), ("read", 150), ("read", 150), ("read", 150)], padding=9, resident=160)
@torch.inference_mode()
def test_any_reading_decoding_and_cropping_equals_plain_transformers(session, operations, padding, resident):
    """A batch padded in every turn that reads, all in the budget, kept or read back each time."""
    model, batch = llama(), 1 if padding is None else 2
    read = batch * sum(count for kind, count in [("read", 80), *operations] if kind != "crop")
    plain = copy.deepcopy(model)
    expected = DynamicCache(config=plain.config)
    seed, mask = 0, torch.zeros(batch, 0, dtype=torch.long)
    with hillinfer.attach(
        model,
        session=session,
        budget="100%",
        resident=ARENA + resident * 1024 + read * TOKEN_BYTES,
        precision="int8",
    ) as attachment:
        cache = attachment.new_cache()
        for kind, count in [("read", 80), *operations, ("decode", 3)]:
            if kind == "crop":
                # Not to nothing: transformers' own masks go wrong on an emptied batch.
                count = min(count, cache.get_seq_length() - 75)
                if count < 0:
                    continue
                cache.crop(-count)
                expected.crop(-count)
                mask = mask[:, : mask.shape[1] - count]
                assert cache.get_seq_length() == mask.shape[1]
                continue
            for size in [count] if kind == "read" else [1] * count:
                seed += 1
                ids, new = tokens(size, seed, batch), torch.ones(batch, size, dtype=torch.long)
                if padding is not None:
                    new[1, : min(padding, size - 1)] = 0
                mask = torch.cat([mask, new], 1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -size:]
                wanted, got = (
                    each(ids, past_key_values=past, attention_mask=mask, position_ids=positions).logits[:, -1]
                    for each, past in ((plain, expected), (model, cache))
                )
                close(got, wanted)


@pytest.mark.parametrize("make", [llama, sliding])
@pytest.mark.parametrize("assistant", ["another model", "itself", "prompt lookup"])
def test_assisted_generation_equals_plain(session, make, assistant):
    model = make()
    plain = copy.deepcopy(model)
    ids = tokens(30).repeat(1, 10)
    if assistant == "prompt lookup":
        how = {"prompt_lookup_num_tokens": 5}
    else:
        how = {"assistant_model": make(3) if assistant == "another model" else copy.deepcopy(model)}
        how["assistant_model"].generation_config.num_assistant_tokens = 6
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 50}
    with torch.inference_mode():
        expected = plain.generate(ids, **options)
        with hillinfer.attach(model, session=session, budget="100%", precision="int8") as attachment:
            actual = model.generate(ids, **options, **how)
            report = attachment.report()
    assert torch.equal(actual, expected)
    # Nothing was copied: each token went to the cold pool once at most.
    assert report.cold_written_bytes <= report.full_bytes + 50 * 2 * 2 * 128


@torch.inference_mode()
def test_turns_on_one_text_each_rolled_back(session):
    """Questions in turn on a text, each dropped after its answer, as if each were asked alone."""
    model = llama()
    plain, text = copy.deepcopy(model), tokens(700)
    options = {"do_sample": False, "max_new_tokens": 40}
    with hillinfer.attach(model, session=session, budget="100%", precision="int8") as attachment:
        cache = attachment.new_cache()
        step(model, cache, text)
        for turn in range(3):
            ids = torch.cat([text, tokens(25, seed=turn)], 1)
            mask = torch.ones_like(ids)
            got = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
            assert torch.equal(got, plain.generate(ids, attention_mask=mask, **options))
            cache.crop(-(cache.get_seq_length() - 700))
            assert cache.get_seq_length() == 700
            held = cache.resident()
            assert attachment.report().resident["evaluation_keys"] >= 2 * held["evaluation_keys"] > 0
            assert held["evaluation_keys"] == session.status().device.evaluation_key_bytes
            assert len(session.status().sessions[0].contexts) == 1


@torch.inference_mode()
def test_no_dropped_row_is_attended(session):
    """With a small budget: after a crop and another text in its place, every row held is the token's own."""
    model = llama()
    with hillinfer.attach(
        model, session=session, budget=120, resident=ARENA + (1 << 20), precision="int8"
    ) as attachment:
        cache = attachment.new_cache()
        for turn, dropped in enumerate((0, 20, 300, 37, 500)):
            cache.crop(-dropped)
            step(model, cache, tokens(400, seed=turn))
            for number in range(12):
                step(model, cache, tokens(1, seed=100 * turn + number))
            for layer in cache.full_layers:
                context, slots, hot = cache.contexts[0], layer.slots, layer.hot
                length = int(slots.lengths[0])
                assert length == cache.get_seq_length()
                assert slots.visible() is None
                for head in range(2):
                    ids = slots.ids[0, head]
                    assert len(set(ids)) == len(ids) == 120 - slots.pinned
                    assert slots.sinks <= ids.min()
                    assert ids.max() < length - slots.recent
                    rows = context.fetch_range(layer.index, 0, context.length(layer.index))[head]
                    assert np.array_equal(slots.keys[0, head, slots.pinned :].numpy(), rows[ids, 0])
                    assert np.array_equal(slots.values[0, head, slots.pinned :].numpy(), rows[ids, 1])
                    kept = hot.ids[0, head] != EMPTY
                    assert kept.any()
                    assert np.array_equal(hot.rows[0, head, kept], rows[hot.ids[0, head, kept]])


@torch.inference_mode()
def test_back_to_a_saved_text_copies_nothing_of_it(session):
    model, text, labels = llama(), tokens(512), {"text": "a text"}
    with hillinfer.attach(model, session=session, budget="100%", precision="int8") as attachment:
        writer = attachment.new_cache(durable="text", labels=labels)
        step(model, writer, text)
        step(model, writer, tokens(200, seed=1))
        with pytest.raises(InvalidInput, match="save"):
            writer.crop(-150)
        writer.crop(-9)
        step(model, writer, tokens(9, seed=2))
        writer.save()
        for cache in (writer, attachment.new_cache(base="text", labels=labels)):
            expected = step(model, cache, tokens(300, seed=3))
            before = session.counters.written_bytes
            cache.crop(-300)
            assert session.counters.written_bytes == before
            close(step(model, cache, tokens(300, seed=3)), expected)
            # Below the saved text, what is kept of it is copied.
            cache.crop(600)
            assert cache.get_seq_length() == 600
            assert session.counters.written_bytes > before
            step(model, cache, tokens(5))
        assert session.find_context("text").tokens == 712


@torch.inference_mode()
def test_what_cannot_be_cropped_says_so_and_changes_nothing(session, monkeypatch):
    model, plain = sliding(), sliding()
    with hillinfer.attach(model, session=session, budget="100%", precision="int8") as attachment:
        cache = attachment.new_cache()
        step(model, cache, tokens(200))
        with pytest.raises(InvalidInput, match="activate_past_recording"):
            cache.crop(-5)
        cache.crop(0)
        cache.activate_past_recording()
        step(model, cache, tokens(40, seed=1))
        with pytest.raises(InvalidInput, match="activate_past_recording"):
            cache.crop(-41)
        cache.crop(-40)
        close(
            step(model, cache, tokens(40, seed=2)),
            step(plain, None, torch.cat([tokens(200), tokens(40, seed=2)], 1)),
        )
        with pytest.raises(InvalidInput, match="crop the cache"):
            cache.full_layers[0].crop(-200)
    model, plain = llama(), llama()
    with hillinfer.attach(model, session=session, budget="100%", precision="int8") as attachment:
        cache = attachment.new_cache()
        step(model, cache, tokens(300))

        def full(*args, **kwargs):
            raise PoolFull("no room")

        with monkeypatch.context() as patch:
            patch.setattr(type(session), "open_context", full)
            with pytest.raises(PoolFull):
                cache.crop(-200)
        assert cache.get_seq_length() == 300
        expected = step(plain, None, torch.cat([tokens(300), tokens(30, seed=1)], 1))
        close(step(model, cache, tokens(30, seed=1)), expected)
        for refused in (lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
            with pytest.raises(UnsupportedModel):
                refused()
        cache.crop(-330)
        assert cache.get_seq_length() == 0
        close(step(model, cache, tokens(50)), step(plain, None, tokens(50)))
