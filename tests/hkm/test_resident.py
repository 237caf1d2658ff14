"""What the report says is held is what is alive."""

import gc
import types
import weakref

import numpy as np
import pytest
import torch
from small_models import COMMON
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import hillinfer

ARENA = 1 << 20
TOKENS = 3000
CHUNK = 500


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(**COMMON | {"num_hidden_layers": 4, "max_position_embeddings": 8192})
    return LlamaForCausalLM(config).eval()


def alive(cache, session):
    """Bytes of the distinct arrays and tensors that the cache refers to, the session's arena aside."""
    seen, storages, todo = {id(session)}, {}, [cache]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, weakref.ProxyType):
            continue
        elif isinstance(thing, np.ndarray):
            if thing.base is None:
                storages[thing.ctypes.data] = thing.nbytes
            else:
                todo.append(thing.base)
        else:
            todo.extend(gc.get_referents(thing))
    return sum(storages.values())


def held_in_this_process(cache):
    kinds = cache.resident()
    return kinds["slots"] + kinds["hot_pool"] + kinds["buffers"] - ARENA


@torch.inference_mode()
def test_the_report_counts_what_is_alive(daemon, model):
    limit = ARENA + 700 * 1024
    ids = torch.randint(1, 97, (1, TOKENS))
    with (
        hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="resident") as session,
        hillinfer.attach(model, session=session, budget="10%", resident=limit) as attachment,
    ):
        cache = attachment.new_cache()
        row_bytes = 2 * 16 * 4
        one_layer = TOKENS * 2 * row_bytes
        during_prefill = []
        original = cache.account
        cache.account = lambda: (during_prefill.append(alive(cache, session)), original())
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        del cache.account
        assert len(during_prefill) >= 4 * TOKENS // CHUNK
        assert max(during_prefill) <= limit - ARENA
        assert max(during_prefill) < one_layer
        # The pinned slots and the tails, and nothing of the length of the context.
        assert abs(alive(cache, session) - held_in_this_process(cache)) < 4096
        assert alive(cache, session) < one_layer // 4

        model.generate(
            torch.cat([ids, ids[:, :5]], 1), past_key_values=cache, do_sample=False, max_new_tokens=30
        )
        # Position arrays and the like are not counted as KV.
        assert abs(alive(cache, session) - held_in_this_process(cache)) < 16384
        daemon_side = session.status().device.evaluation_key_bytes
        assert daemon_side == cache.resident()["evaluation_keys"]
        assert attachment.report().resident_peak_bytes <= limit


def test_memory_comes_back(daemon, model):
    ids = torch.randint(1, 97, (1, 600))
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="again") as session:
        with hillinfer.attach(model, session=session) as attachment, torch.inference_mode():
            for _ in range(5):
                model.generate(ids, do_sample=False, max_new_tokens=3)
            assert len(session.status().sessions[0].contexts) <= 2
            report = attachment.report()
        assert report.full_bytes == 602 * 4 * 2 * 2 * 16 * 4
        assert not [c for s in session.status().sessions for c in s.contexts]


def random_ids(count):
    return torch.randint(1, 97, (1, count))


def held(cache):
    """Bytes held now, rows that wait for their layers as they are."""
    answers = [job.answer for job in cache.pipeline._jobs.values() if job.answer is not None]
    for answer in answers:
        answer.result()
    rows = sum(brought.rows.nbytes for answer in answers for brought in answer.come())
    return sum(cache.resident().values()) - cache.pipeline.nbytes + rows


@pytest.fixture
def attached(daemon, model):
    """Return a function that attaches the model within a limit, with a small arena."""
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="tight") as session:

        def attach(over_arena, **options):
            return hillinfer.attach(model, session=session, resident=ARENA + over_arena, **options)

        yield attach


@torch.inference_mode()
def test_a_prompt_on_a_full_hot_pool_makes_room_first(attached, model):
    limit = 2000 << 10
    with attached(limit, budget="5%", predictor="exact") as attachment:
        cache = attachment.new_cache()
        model(random_ids(TOKENS), past_key_values=cache, logits_to_keep=1)
        for _ in range(20):
            model(random_ids(1), past_key_values=cache)
        full = cache.full_layers[0].hot.capacity
        assert full
        model(random_ids(4000), past_key_values=cache, logits_to_keep=1)
        assert 0 < cache.full_layers[0].hot.capacity < full
        assert attachment.report().resident_peak_bytes <= ARENA + limit


@torch.inference_mode()
def test_a_shorter_context_has_fewer_hit_counters(attached, model):
    limit = 1400 << 10
    with attached(limit, budget="5%", predictor="exact") as attachment:
        cache = attachment.new_cache()
        model(random_ids(7000), past_key_values=cache, logits_to_keep=1)
        for _ in range(3):
            model(random_ids(1), past_key_values=cache)
        cache.crop(2000)
        for _ in range(3):
            model(random_ids(1), past_key_values=cache)
        assert cache.full_layers[0].hot.capacity
        assert held(cache) <= ARENA + limit


@torch.inference_mode()
def test_where_one_layers_selection_does_not_fit_everything_is_attended(attached, model):
    ids, following, limit = random_ids(4500), random_ids(1), 560 << 10
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    expected = model(following, past_key_values=cache).logits
    with attached(limit, budget="45%", predictor="exact") as attachment:
        cache = attachment.new_cache()
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        logits = model(following, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert attachment.report().resident_peak_bytes <= ARENA + limit


@torch.inference_mode()
def test_layers_that_append_in_a_step_keep_within_what_was_divided_before_it(attached, model):
    for limit in range(1000 << 10, 1800 << 10, 200 << 10):
        with attached(limit, budget="5%", predictor="next_layer") as attachment:
            cache = attachment.new_cache()
            model(random_ids(TOKENS), past_key_values=cache, logits_to_keep=1)
            before = cache.contexts[0].length(3)
            for _ in range(2 * cache.contexts[0].append_unit):
                model(random_ids(1), past_key_values=cache)
                assert held(cache) <= ARENA + limit
            assert cache.contexts[0].length(3) > before
            assert cache.full_layers[3].hot.capacity
            assert len({layer.hot.capacity for layer in cache.full_layers[1:]}) == 1
            assert attachment.report().resident_peak_bytes <= ARENA + limit


@torch.inference_mode()
def test_rows_asked_for_a_step_ahead_are_counted(attached, model):
    waited = 0
    for limit in range(700 << 10, 2000 << 10, 100 << 10):
        with attached(limit, budget="20%", predictor="previous_step") as attachment:
            cache = attachment.new_cache()
            model(random_ids(TOKENS), past_key_values=cache, logits_to_keep=1)
            for _ in range(4):
                model(random_ids(1), past_key_values=cache)
                assert held(cache) <= ARENA + limit
                waited = max(waited, len(cache.pipeline.pending))
            assert attachment.report().resident_peak_bytes <= ARENA + limit
    assert waited == 4


@torch.inference_mode()
def test_sliding_windows_are_counted(daemon):
    torch.manual_seed(5)
    sliding = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=256,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )
    ).eval()
    with (
        hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA) as session,
        hillinfer.attach(sliding, session=session, budget=80, resident=ARENA + (800 << 10)) as attachment,
    ):
        cache = attachment.new_cache()
        sliding(random_ids(600), past_key_values=cache, logits_to_keep=1)
        sliding(random_ids(1), past_key_values=cache)
        windows = [each for layer in cache.layers if layer.is_sliding for each in (layer.keys, layer.values)]
        assert cache.resident()["sliding_windows"] == sum(each.nbytes for each in windows) > 0
        report = attachment.report()
        assert sum(report.resident.values()) == report.resident_peak_bytes <= ARENA + (800 << 10)
