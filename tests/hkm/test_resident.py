"""What the report says is held is what is alive."""

import gc
import types
import weakref

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer

ARENA = 1 << 20
TOKENS = 3000
CHUNK = 500


@pytest.fixture
def model():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=8192,
        )
    ).eval()


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
