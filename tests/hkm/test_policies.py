"""The policies to compare against: their budgets, their rules, and the best that any can do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import COMMON
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hillinfer
from hillinfer.eval.metrics import Attended, SelectionMetrics, Sums
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.hkm.slots import EMPTY
from hillinfer.policies import POLICIES
from hillinfer.policies.base import KeyCopy, attention_mass, group_sum
from hillinfer.policies.h2o import add_mass
from hillinfer.policies.next_layer import NextLayerQuery
from hillinfer.policies.reading import Reader
from hillinfer.session import EvaluateItem
from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget

CONFIG = COMMON | {"num_hidden_layers": 3}
TOKENS, BUDGET = 600, 75


def made(kind=LlamaForCausalLM, config=LlamaConfig):
    torch.manual_seed(3)
    return kind(config(**CONFIG)).eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(0)
    return torch.randint(1, 97, (1, TOKENS))


@pytest.fixture(scope="module")
def session(daemon, model):
    with (
        hillinfer.Session.connect(daemon.socket, name="policies") as session,
        hillinfer.attach(model, session=session),
    ):
        yield session


@pytest.fixture
def begin(session, model, ids):
    """Return a function that reads the context and gives cache and policy, ready for single-token steps."""
    opened = []

    def start(name, budget=BUDGET):
        base = HkmConfig(Budget(tokens=budget), 64 << 20, Precision.int4)
        reader = Reader(TOKENS, with_mass=True)
        config = POLICIES[name](model, reader.reading).config(base) if name != "next_layer" else base
        cache = HierarchicalCache(session, model.config, config)
        cache.observer = reader.observe
        with torch.inference_mode():
            for part in ids.split(250, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
        for layer in cache.full_layers:
            layer.append_window()
        policy = POLICIES[name](model, reader.reading)
        cache.policy, cache.observer = policy, policy.observe
        if policy.predictor is not None:
            cache.predictor = policy.predictor
        opened.extend((policy, cache))
        return cache, policy

    yield start
    for each in opened:
        each.close()


@torch.inference_mode()
def go_on(model, cache, count, observe=lambda *seen: None):
    """Generate `count` tokens, a token at a time, from token 5; returns the logits [count, vocabulary]."""
    follow = cache.observer

    def both(*seen):
        observe(*seen)
        follow(*seen)

    cache.observer = both
    token, logits = 5, []
    for _ in range(count):
        out = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        logits.append(out)
        token = int(out.argmax())
    cache.observer = follow
    return torch.stack(logits)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_no_step_attends_to_more_than_the_budget(model, begin, name):
    cache, _ = begin(name)
    attended = Attended()
    go_on(model, cache, 20, attended.observe)
    # All have more tokens to choose from than they may take, so none should leave any of the budget.
    assert attended.most == BUDGET
    assert attended.take() == BUDGET
    for layer in cache.full_layers:
        chosen = layer.slots.ids[layer.slots.ids != EMPTY]
        if name != "recent":
            assert len(chosen) == 2 * (BUDGET - layer.slots.pinned)
            assert chosen.min() >= layer.slots.sinks
            assert chosen.max() < layer.slots.lengths[0] - layer.slots.recent


def test_full_attention_is_transformers_own(model, ids, begin):
    cache, _ = begin("full")
    attended = Attended()
    actual = go_on(model, cache, 12, attended.observe)
    assert attended.most == TOKENS + 12
    plain = made()
    with torch.inference_mode():
        out = plain(ids)
        expected, token, past = [], 5, out.past_key_values
        for _ in range(12):
            logits = plain(torch.tensor([[token]]), past_key_values=past).logits[0, -1]
            expected.append(logits)
            token = int(logits.argmax())
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert actual.argmax(-1).tolist() == torch.stack(expected).argmax(-1).tolist()


def test_no_choice_captures_more_than_the_oracles(session, begin):
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((6, 4, 16)).astype(np.float32) * 4
    captured = {}
    for name in POLICIES:
        if name in ("full", "recent"):
            continue
        cache, policy = begin(name)
        [context] = cache.contexts
        nothing = np.zeros((2, 0), np.uint32)
        for number, query in enumerate(queries):
            layer = number % 3
            item = EvaluateItem(context, query, 40, 4, TOKENS - 32, nothing)
            [brought] = policy.select(session, layer, [item])
            assert brought.ids.shape == (2, 40)
            assert (np.diff(brought.ids.astype(int)) > 0).all()
            keys = KeyCopy().keys(context, layer, TOKENS)
            expected, _ = context.fetch(layer, brought.ids)
            assert (brought.rows[:, 0].reshape(expected.shape) == expected).all()
            mass = attention_mass(query, keys, 0.25)
            each = [mass[head][:, brought.ids[head]].sum() for head in range(2)]
            captured.setdefault(name, []).append(sum(each))
    assert set(captured) == set(POLICIES) - {"full", "recent"}
    for name, each in captured.items():
        assert all(best >= other - 1e-5 for best, other in zip(captured["oracle"], each, strict=True)), name
        if name not in ("oracle", "hillinfer", "next_layer"):
            assert sum(captured["oracle"]) > 1.05 * sum(each), name


def test_what_h2o_drops_never_comes_back(model, begin):
    cache, _ = begin("h2o")
    go_on(model, cache, 1)
    before = [set(layer.slots.ids[0, 0].tolist()) for layer in cache.full_layers]
    go_on(model, cache, 30)
    for layer, held in zip(cache.full_layers, before, strict=True):
        later = set(layer.slots.ids[0, 0].tolist())
        left_the_window = range(TOKENS + 1 - layer.slots.recent, TOKENS + 31)
        assert later <= held | set(left_the_window)
        assert later & held


def test_mass_is_the_sum_of_the_attention_of_all_queries():
    torch.manual_seed(1)
    query, keys = torch.randn(4, 300, 8), torch.randn(2, 300, 8)
    scores = torch.einsum("hgqd,hkd->hgqk", query.view(2, 2, 300, 8), keys) * 0.3
    hidden = torch.ones(300, 300).triu(1).bool()
    expected = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1).sum((1, 2))
    mass = np.zeros((2, 300), np.float32)
    for start, end in ((0, 270), (270, 299), (299, 300)):  # in chunks, as a context is read
        add_mass(mass[:, :end], query[:, start:end], keys[:, :end].numpy(), 0.3, None)
    np.testing.assert_allclose(mass, expected.numpy(), rtol=1e-4)


def test_a_page_is_never_worth_less_than_its_best_token(model):
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((2, 100, 16)).astype(np.float32)
    query = rng.standard_normal((4, 16)).astype(np.float32)
    quest = POLICIES["quest"](model, SimpleNamespace())
    scores = quest.block_scores(0, EvaluateItem(None, query, 1, 0, 100, None), keys)
    assert scores.shape == (2, 7)
    tokens = group_sum(query, keys)
    for block in range(7):
        assert (scores[:, block] >= tokens[:, block * 16 : block * 16 + 16].max(axis=1) - 1e-4).all()


def test_previous_step_ranks_with_the_query_before(session, begin):
    cache, policy = begin("previous_step")
    [context] = cache.contexts
    rng = np.random.default_rng(4)
    first, second = rng.standard_normal((2, 4, 16)).astype(np.float32) * 4
    nothing = np.zeros((2, 0), np.uint32)

    def chosen(query):
        return policy.select(session, 0, [EvaluateItem(context, query, 40, 4, 560, nothing)])[0].ids

    from_reading = chosen(first)
    assert (from_reading == chosen(second)).all()
    policy.observe(cache, 0, torch.from_numpy(first)[None, :, None], 0.25)
    assert (chosen(second) != from_reading).any()


@pytest.mark.parametrize(
    ("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)]
)
@torch.inference_mode()
def test_the_predicted_query_is_the_layers_own_where_layers_add_nothing(daemon, kind, config, ids):
    model = made(kind, config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    sums: dict[int, Sums] = {}
    predictor = NextLayerQuery(model)
    with hillinfer.attach(model, socket=daemon.socket, budget=100) as attachment:
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)
        cache.observer = SelectionMetrics(sums, predictor).observe
        go_on(model, cache, 1)
    predictor.close()
    means = {layer: each.means() for layer, each in sums.items()}
    assert means[0]["query_cosine"] is None
    assert means[1]["query_cosine"] == pytest.approx(1, abs=1e-5)
    assert means[2]["query_cosine"] == pytest.approx(1, abs=1e-5)
    assert 0.8 < means[1]["recall"] <= 1
    assert 0 < means[1]["captured_mass"] < 1
    predictor.predicted.clear()
    model(ids[:, :1])
    assert not predictor.predicted, "the hooks are still in the model"


def test_a_model_of_another_layout_says_so():
    model = Phi3ForCausalLM(Phi3Config(**CONFIG))
    model.model.layers = torch.nn.ModuleDict({str(n): each for n, each in enumerate(model.model.layers)})
    with pytest.raises(UnsupportedModel, match="no single list of decoder layers"):
        NextLayerQuery(model)
