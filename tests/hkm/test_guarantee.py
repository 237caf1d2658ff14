"""Guarantee mode: what is reported is never more than the attention that the attended tokens hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.hkm.slots import EMPTY
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget

DIM, KV_HEADS, GROUP, SINKS, RECENT = 16, 2, 2, 4, 32
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": KV_HEADS * GROUP,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": 97,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=1 << 20, name="guarantee") as session:
        yield session


def true_shares(cache, index, query, scaling, row=0):
    """float64 [H]: the softmax weight on what the layer's slots hold, over its whole past."""
    layer, context = cache.full_layers[index], cache.contexts[row]
    layer.append_window()
    tokens = int(layer.slots.lengths[row])
    keys = context.fetch_range(index, 0, tokens)[:, :, 0]
    if keys.dtype == np.uint16:
        keys = (keys.astype(np.uint32) << 16).view(np.float32)
    keys = np.repeat(keys.astype(np.float64), query.shape[1] // len(keys), axis=0)
    scores = np.einsum("hd,hnd->hn", query[row, :, 0].double().numpy(), keys) * scaling
    if layer.softcap is not None:
        scores = np.tanh(scores / layer.softcap) * layer.softcap
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    held = np.zeros((len(weights), tokens), bool)
    held[:, :SINKS] = held[:, -layer.slots.recent :] = True
    for head, ids in enumerate(layer.slots.ids[row]):
        group = len(held) // len(layer.slots.ids[row])
        held[head * group : (head + 1) * group, ids[ids != EMPTY]] = True
    if layer.attended_all:
        held[:] = True
    return (weights * held).sum(axis=1) / weights.sum(axis=1)


class Checker:
    """Compares what was reported after every decode step with the truth; an observer."""

    def __init__(self):
        self.steps, self.all, self.least = 0, 0, 1.0

    def __call__(self, cache, index, query, scaling):
        if query.shape[2] > 1:
            return
        tally, layer = cache.guarantee.tally, cache.full_layers[index]
        for row in range(query.shape[0]):
            true = true_shares(cache, index, query, scaling, row)
            told = np.ones_like(true) if layer.attended_all else tally.last[index][row]
            if tally.sound:
                assert (told <= true + 1e-12).all(), (index, told, true)
                assert (told >= tally.target).all()
            self.least = min(self.least, true.min())
        self.steps += 1
        self.all += layer.attended_all


def made(cache, rng, tokens, dtype, magnitudes, spread=1.0):
    keys = rng.standard_normal((1, KV_HEADS, tokens, DIM)) * magnitudes * spread
    return torch.from_numpy(keys).to(dtype), torch.from_numpy(keys[..., ::-1].copy()).to(dtype)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    power=st.floats(-3, 3),
    outliers=st.booleans(),
    opposing=st.booleans(),
    target=st.sampled_from([0.3, 0.9, 0.95, 0.999]),
    softcap=st.sampled_from([None, 5.0]),
)
@example(seed=1, dtype=torch.float32, power=3.0, outliers=True, opposing=True, target=0.95, softcap=None)
def test_the_bound_holds_for_any_keys_and_queries(
    session, seed, dtype, power, outliers, opposing, target, softcap
):
    rng = np.random.default_rng(seed)
    config = HkmConfig(Budget(alpha=1.0), 64 << 20, Precision.int8, SINKS, RECENT, min_mass=target)
    cache = HierarchicalCache(session, LlamaConfig(**SHAPE, num_hidden_layers=1), config)
    cache.observer = checker = Checker()
    layer = cache.full_layers[0]
    magnitudes = 10.0 ** rng.uniform(-1.5, 1.5, DIM)

    def attend(keys, values, query):
        cache.update(keys, values, 0)
        return layer.attend(query, keys, values, None, DIM**-0.5, softcap)

    def query(tokens):
        q = rng.standard_normal((1, KV_HEADS * GROUP, tokens, DIM)) / magnitudes * 10.0**power / DIM
        if opposing:
            q[:, 1::2] = -q[:, ::2]
        return torch.from_numpy(q).to(dtype)

    keys, values = made(cache, rng, 1100, dtype, magnitudes)
    keys[..., 5] = keys[0, 0, 0, 5]
    attend(keys, values, query(1100))
    # Ranges are fixed: what comes now may be outside of them, and is not so much that they are changed.
    keys, values = made(cache, rng, 96, dtype, magnitudes)
    if outliers:
        keys[:, :, 3::40] *= 30
    attend(keys, values, query(96))
    for step in range(4):
        keys, values = made(cache, rng, 1, dtype, magnitudes, 1 + 5 * (outliers and step == 1))
        output = attend(keys, values, query(1))
        assert output.isfinite().all()
    assert checker.steps == 4
    assert cache.guarantee.tally.layers[0].steps == 4
    cache.close()


def generated(model, session, tokens=1300, batch=1, new=6, **options):
    torch.manual_seed(batch)
    ids = torch.randint(1, 97, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[1:, :200] = 0
    with hillinfer.attach(model, session=session, **options) as attachment:
        cache = attachment.new_cache()
        cache.observer = checker = Checker()
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False
        )
        return out, checker, attachment.report()


@pytest.fixture
def llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=3)).eval()


def test_a_model_attends_to_what_each_layer_needs_and_reports_it(llama, session):
    _, checker, report = generated(llama, session, batch=2, min_mass=0.9, precision="int8")
    mass = report.mass
    assert (mass.kind, mass.target) == ("bound", 0.9)
    assert 0.9 <= mass.least <= checker.least + 1e-12
    assert mass.least <= mass.mean <= 1
    assert len(mass.attended) == len(mass.whole) == 3
    assert max(mass.attended) <= 1306
    assert checker.steps == 3 * 5
    assert report.resident_peak_bytes <= 64 << 20


def test_the_whole_of_the_attention_is_all_tokens_and_plain_attention(llama, session):
    out, _, report = generated(llama, session, min_mass=1.0, precision="int8")
    assert report.mass.whole == (1.0, 1.0, 1.0)
    assert report.mass.least == 1.0
    ids = out[:, :1300]
    assert torch.equal(llama.generate(ids, max_new_tokens=6, do_sample=False), out)


def test_int4_keys_give_an_estimate_and_say_so(llama, session):
    _, _, report = generated(llama, session, min_mass=0.9, precision="int4")
    assert report.mass.kind == "estimate"
    assert 0 < report.mass.least <= 1


def test_a_predicted_query_gives_an_estimate(session):
    class Yesterday:
        def ranking_query(self, layer, exact):
            return np.roll(exact, 1, axis=1)

    config = HkmConfig(Budget(alpha=1.0), 64 << 20, Precision.int8, min_mass=0.9)
    llama = LlamaConfig(**SHAPE, num_hidden_layers=1)
    cache = HierarchicalCache(session, llama, config, predictor=Yesterday())
    assert not cache.guarantee.tally.sound
    assert HierarchicalCache(session, llama, config).guarantee.tally.sound


def test_softcapped_and_sliding_layers(session):
    torch.manual_seed(5)
    config = Gemma2Config(**SHAPE, num_hidden_layers=2, sliding_window=64, attn_logit_softcapping=3.0)
    _, checker, report = generated(Gemma2ForCausalLM(config).eval(), session, min_mass=0.8, precision="int8")
    assert checker.steps == 5
    assert report.mass.least >= 0.8


def test_resident_holds_when_layers_need_more_than_there_is_room_for(llama, session):
    needed = generated(llama, session, min_mass=0.9, precision="int8")[2]
    # Below what slots and hot pool took, above what must be held.
    least = sum(needed.resident[kind] for kind in ("evaluation_keys", "checksums", "buffers"))
    resident = least + 3 * (SINKS + RECENT) * KV_HEADS * 2 * DIM * 4 + 40_000
    _, checker, report = generated(llama, session, min_mass=0.9, precision="int8", resident=resident)
    assert report.resident_peak_bytes <= resident
    assert report.mass.least >= 0.9
    assert checker.steps == 15


def test_a_share_that_is_none_and_a_budget_besides_are_refused(llama, session):
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="share of the attention"):
            hillinfer.attach(llama, session=session, min_mass=share)
    with pytest.raises(InvalidInput, match="no budget"):
        hillinfer.attach(llama, session=session, min_mass=0.9, budget="2%")
