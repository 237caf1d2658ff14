"""Steps that fail, models with sliding windows, and other ways to call a model than `generate`."""

import pytest
import torch
from small_models import COMMON
from test_exactness import ARENA, prompt
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import hillinfer
from hillinfer.context import Context
from hillinfer.eval.metrics import Attended, SelectionMetrics
from hillinfer.policies.base import attention_mass
from hillinfer_core.errors import DaemonUnavailable, InvalidInput, UnsupportedModel

IDS, _ = prompt(1, 300, False)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**COMMON)).eval()


@pytest.fixture(scope="module")
def sliding():
    """Its first layer slides, its second does not; scores are capped."""
    torch.manual_seed(7)
    return Gemma2ForCausalLM(
        Gemma2Config(**COMMON, sliding_window=64, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    ).eval()


@pytest.fixture(scope="module")
def durable_daemon(tmp_path_factory):
    with hillinfer.PrivateDaemon(pool_capacity=64 << 20, pool_dir=tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture
def session(durable_daemon):
    with hillinfer.Session.connect(durable_daemon.socket, arena_bytes=ARENA, name="steps") as session:
        yield session


@torch.inference_mode()
@pytest.mark.parametrize("error", [KeyboardInterrupt, DaemonUnavailable])
def test_a_first_step_on_a_saved_text_may_be_made_again(model, session, monkeypatch, error):
    name, expected = error.__name__, DynamicCache(config=model.config)
    model(IDS, past_key_values=expected)
    wanted = model(IDS[:, :5], past_key_values=expected).logits[0, -1]
    fetch = Context.fetch_range

    def fail_once(*_):
        monkeypatch.setattr(Context, "fetch_range", fetch)
        raise error("once")

    with hillinfer.attach(model, session=session, budget="100%") as attachment:
        writing = attachment.new_cache(durable=name)
        model(IDS, past_key_values=writing)
        writing.save()
        cache = attachment.new_cache(base=name)
        monkeypatch.setattr(Context, "fetch_range", fail_once)
        with pytest.raises(error):
            model(IDS[:, :5], past_key_values=cache)
        got = model(IDS[:, :5], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_a_step_that_ends_in_a_sliding_layer_is_the_end_of_its_cache(sliding, session):
    with hillinfer.attach(sliding, session=session, budget="100%") as attachment:
        cache = attachment.new_cache()
        sliding(IDS, past_key_values=cache)
        hook = sliding.model.layers[0].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            sliding(IDS[:, :5], past_key_values=cache)
        hook.remove()
        for _ in range(2):
            with pytest.raises(InvalidInput, match="new_cache"):
                sliding(IDS[:, :5], past_key_values=cache)


@torch.inference_mode()
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reset(),
        lambda cache: cache.reorder_cache(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
    ],
)
def test_what_a_cache_cannot_do_changes_none_of_its_layers(sliding, session, change):
    expected = DynamicCache(config=sliding.config)
    sliding(IDS, past_key_values=expected)
    wanted = sliding(IDS[:, :5], past_key_values=expected).logits[0, -1]
    with hillinfer.attach(sliding, session=session, budget="100%") as attachment:
        cache = attachment.new_cache()
        sliding(IDS, past_key_values=cache)
        with pytest.raises(UnsupportedModel):
            change(cache)
        got = sliding(IDS[:, :5], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_first_step_that_fails_may_be_made_again_with_the_callers_cache(model, session):
    given = DynamicCache(config=model.config)
    with hillinfer.attach(model, session=session):
        hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS, past_key_values=given)
        hook.remove()
        model(IDS, past_key_values=given)


def test_without_a_cache_gradients_flow_as_ever(model, session):
    with hillinfer.attach(model, session=session):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    model.zero_grad()


@torch.no_grad()
def test_a_cache_that_another_took_the_place_of_is_not_begun_twice(model, session):
    with hillinfer.attach(model, session=session) as attachment:
        replaced = DynamicCache(config=model.config)
        out = model(IDS, past_key_values=replaced)
        with pytest.raises(InvalidInput, match="past_key_values"):
            model(IDS[:, :5], past_key_values=replaced)
        assert out.past_key_values is attachment.last_cache
        model(IDS[:, :5], past_key_values=out.past_key_values)


def test_gradients_are_refused_before_anything_happens(model, session):
    with hillinfer.attach(model, session=session) as attachment:
        with torch.no_grad():
            cache = attachment.new_cache()
            model(IDS, past_key_values=cache)
        for tokens in (1, 5):
            with pytest.raises(InvalidInput, match="no_grad"):
                model(IDS[:, :tokens], past_key_values=cache)
        with torch.no_grad():
            model(IDS[:, :1], past_key_values=cache)


def test_generate_goes_on_with_what_inference_mode_began(model, session):
    options = GenerationConfig(max_new_tokens=5, do_sample=False)
    wanted = model.generate(IDS, options)
    with hillinfer.attach(model, session=session, budget="100%") as attachment:
        cache = attachment.new_cache()
        with torch.inference_mode():
            model(IDS[:, :200], past_key_values=cache)
            model(IDS[:, 200:201], past_key_values=cache)
        assert torch.equal(model.generate(IDS, options, past_key_values=cache), wanted)


@torch.inference_mode()
@pytest.mark.parametrize("room", [True, False])
def test_what_a_step_attended_to_is_measured_where_slots_are_not_kept_too(model, session, room):
    ids, _ = prompt(1, 1500, False)
    resident = ARENA + (8 << 20 if room else 420 << 10)
    found = {}
    with hillinfer.attach(
        model, session=session, budget="50%", resident=resident, predictor="exact"
    ) as attachment:
        cache, attended, layers = attachment.new_cache(), Attended(), found
        metrics = SelectionMetrics(layers, None)
        model(ids, past_key_values=cache)

        def observe(*step):
            attended.observe(*step)
            metrics.observe(*step)

        cache.observer = observe
        for number in range(3):
            model(ids[:, number : number + 1], past_key_values=cache)
        assert (cache.full_layers[0].slots.selected > 0) == room
    assert attended.take() == pytest.approx(751, abs=2)
    assert found[0].means()["captured_mass"] > 0.6
    assert found[0].means()["step_overlap"] > 0.3


@torch.inference_mode()
def test_the_overlap_of_steps_that_attended_to_everything_is_whole(model, session):
    found = {}
    with hillinfer.attach(model, session=session, min_mass=0.9999, precision="int8") as attachment:
        cache = attachment.new_cache()
        model(IDS, past_key_values=cache)
        cache.observer = SelectionMetrics(found, None).observe
        for number in range(3):
            model(IDS[:, number : number + 1], past_key_values=cache)
    assert found[0].means()["step_overlap"] > 0.9


def test_mass_has_the_models_cap_on_scores():
    torch.manual_seed(3)
    query, keys = torch.randn(4, 8) * 5, torch.randn(2, 60, 8)
    scores = torch.einsum("hgd,hnd->hgn", query.view(2, 2, 8), keys) * 0.5
    expected = torch.softmax(torch.tanh(scores / 2) * 2, -1)
    got = attention_mass(query.numpy(), keys.numpy(), 0.5, 2.0)
    torch.testing.assert_close(torch.from_numpy(got), expected)
