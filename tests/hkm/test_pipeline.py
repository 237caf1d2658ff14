"""Prefetch while layers compute: the tokens, the faults, and the thread."""

import copy
import threading
from contextlib import ExitStack

import pytest
import torch
from small_models import COMMON
from test_exactness import ARENA, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.context import Context
from hillinfer.hkm.slots import Slots
from hillinfer.pipeline import alone, choice, prefetch
from hillinfer.pipeline.choice import Predictor
from hillinfer.pipeline.first import FirstQuery
from hillinfer.pipeline.timeline import EVALUATE, LATE, MODEL, WORKER
from hillinfer_core.errors import DaemonUnavailable, InvalidInput, UnsupportedModel


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_hidden_layers": 4})).eval()


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="pipeline") as session:
        yield session


@pytest.fixture(scope="module")
def durable_daemon(tmp_path_factory):
    with hillinfer.PrivateDaemon(
        pool_capacity=128 << 20, pool_dir=tmp_path_factory.mktemp("pool")
    ) as running:
        yield running


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hillinfer-prefetch")]


def decode(model, cache, ids, steps):
    """Read `ids` [B, n], then feed `steps` tokens, always the same ones; the logits of these."""
    logits = []
    model(ids, past_key_values=cache)
    for step in range(steps):
        logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def turns(model, ids, mask, cache):
    """Two turns of 10 greedy tokens, the second after 20 more prompt tokens."""
    options = {"do_sample": False, "max_new_tokens": 10, "past_key_values": cache}
    out = model.generate(ids, attention_mask=mask, **options)
    more, _ = prompt(ids.shape[0], 20, False)
    out = torch.cat([out, more], 1)
    mask = torch.cat([mask, torch.ones(ids.shape[0], out.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    return model.generate(out, attention_mask=mask, **options)


@torch.inference_mode()
@pytest.mark.parametrize("predictor", ["auto", "next_layer", "previous_step"])
def test_everything_attended_is_plain_transformers(model, session, predictor):
    ids, mask = prompt(2, 150, True)
    plain = copy.deepcopy(model)
    expected = turns(plain, ids, mask, DynamicCache(config=plain.config))
    with hillinfer.attach(
        model, session=session, budget="100%", resident="64MiB", precision="int8", predictor=predictor
    ) as attachment:
        cache = attachment.new_cache()
        assert torch.equal(turns(model, ids, mask, cache), expected)
        prefetched = cache.pipeline.timeline.sums[WORKER, EVALUATE]
    # The step before does not know the token that has just left the window: all of it is not ranked by it.
    assert (prefetched > 0) == (predictor != "previous_step")


@torch.inference_mode()
def test_the_exact_query_selects_the_same_with_and_without_prefetch(model, session, monkeypatch):
    """With every step sampled each one ranks with its own query, on top of what was prefetched."""
    monkeypatch.setattr(choice, "SAMPLE_EVERY", 1)
    monkeypatch.setattr(choice, "SAMPLE_AT_MOST", 1)
    monkeypatch.setattr(choice, "ENTER_HIDDEN", 0.0)
    monkeypatch.setattr(choice, "ENTER_LOSS", dict.fromkeys(choice.ENTER_LOSS, 1.0))
    ids, _ = prompt(2, 600, False)
    seen = []
    for predictor in ("exact", "auto"):
        with hillinfer.attach(model, session=session, budget=100, predictor=predictor) as attachment:
            cache, chosen = attachment.new_cache(), []
            cache.observer = lambda cache, layer, query, scaling, to=chosen: to.append(
                [{*head} for row in cache.full_layers[layer].slots.ids for head in row]
            )
            logits = decode(model, cache, ids, 10)
            seen.append((logits, chosen))
            late = cache.pipeline.timeline.sums[MODEL, LATE]
    assert late > 0, "nothing was prefetched"
    assert seen[0][1] == seen[1][1]
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("predictor", ["exact", "next_layer", "previous_step"])
def test_the_way_of_an_accelerator_selects_and_attends_the_same(model, session, monkeypatch, predictor):
    """Slots that the host cannot reach, and queries that arrive late: played on the CPU."""
    ids, _ = prompt(2, 500, True)
    seen = []
    for device in ("cpu", "accelerator"):
        if device == "accelerator":
            monkeypatch.setattr(Slots, "_on_host", lambda slots: None)
            monkeypatch.setattr(prefetch, "on_accelerator", lambda tensor: True)
        with hillinfer.attach(
            model, session=session, budget=90, resident="2MiB", predictor=predictor
        ) as attachment:
            cache, chosen = attachment.new_cache(), []
            cache.observer = lambda cache, layer, query, scaling, to=chosen: to.append(
                [{*head} for row in cache.full_layers[layer].slots.ids for head in row]
            )
            logits = decode(model, cache, ids, 12)
            seen.append((logits, chosen, cache.tally.brought))
            assert any(layer.hot.capacity for layer in cache.full_layers)
    assert seen[0][1:] == seen[1][1:]
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_prediction_that_is_the_layers_own_query_selects_as_the_exact_one(session):
    """Layers that add nothing leave the input as it is: next_layer predicts the query itself."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_hidden_layers": 3})).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ids, mask = prompt(2, 500, True)
    outputs = []
    for predictor in ("exact", "next_layer"):
        with hillinfer.attach(model, session=session, budget=90, predictor=predictor) as attachment:
            cache, chosen = attachment.new_cache(), []
            cache.observer = lambda cache, layer, query, scaling, to=chosen: to.append(
                [{*head} for row in cache.full_layers[layer].slots.ids for head in row]
            )
            turns(model, ids, mask, cache)
            outputs.append(chosen)
    assert outputs[0] == outputs[1]


@torch.inference_mode()
@pytest.mark.parametrize("predictor", ["next_layer", "previous_step"])
def test_crop_forgets_what_was_asked_for(model, session, predictor):
    """Rolled back and fed the same tokens again, the cache says the same again."""
    ids, _ = prompt(1, 500, False)
    with hillinfer.attach(
        model, session=session, budget=100, precision="int8", predictor=predictor
    ) as attachment:
        cache = attachment.new_cache()
        decode(model, cache, ids, 6)
        assert bool(cache.pipeline.pending) == (predictor == "previous_step")
        for removed in (3, 100):
            cache.crop(-removed)
            assert not cache.pipeline.pending
            assert cache.get_seq_length() == 506 - removed
            again = model(ids[:, :removed], past_key_values=cache).logits
            assert torch.isfinite(again).all()
            for layer in cache.full_layers:
                assert layer.slots.lengths[0] == 506
                held = layer.slots.ids[layer.slots.ids != 0xFFFFFFFF]
                assert not len(held) or held.max() < 506 - layer.slots.recent
            model(ids[:, :1], past_key_values=cache)
            cache.crop(-1)


@torch.inference_mode()
@pytest.mark.parametrize("predictor", ["next_layer", "previous_step"])
def test_an_answer_for_another_step_is_not_used(model, session, predictor):
    ids, _ = prompt(1, 500, False)
    with hillinfer.attach(model, session=session, budget=100, predictor=predictor) as attachment:
        cache = attachment.new_cache()
        decode(model, cache, ids, 3)
        layer, pipeline = cache.full_layers[1], cache.pipeline
        pipeline.drop()
        query = torch.zeros(1, 4, 1, 16)
        pipeline.before(layer, lambda: query)
        if predictor == "previous_step":
            pipeline.attended(layer, query, None)
        assert pipeline.pending == [1]
        layer.slots.lengths += 1
        assert pipeline.take(layer, query) is None
        layer.slots.lengths -= 1


class InItsThread:
    """Selects as `ColdPoolRanking`; a policy that the pipeline knows nothing of asks in the worker."""

    def select(self, session, layer, items):
        return session.evaluate_and_bring(layer, items)


@torch.inference_mode()
@pytest.mark.parametrize("policy", [None, InItsThread()])
def test_a_daemon_that_dies_is_an_error_at_the_next_attention(model, policy):
    ids, _ = prompt(1, 500, False)
    with hillinfer.PrivateDaemon(pool_capacity=64 << 20) as daemon:
        session = hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, timeout_s=20, restart_s=1)
        attachment = hillinfer.attach(
            model, session=session, budget=100, predictor="next_layer", policy=policy
        )
        cache = attachment.new_cache()
        decode(model, cache, ids, 3)
        select, ask_ahead = cache.pipeline.select, session.ask_ahead

        def stop_then_select(layer, items):
            if threading.current_thread() in workers():
                daemon.__exit__(None, None, None)
            return select(layer, items)

        def ask_then_stop(layer, items):
            assert policy is None
            asked = ask_ahead(layer, items)
            daemon.__exit__(None, None, None)
            return asked

        cache.pipeline.select, session.ask_ahead = stop_then_select, ask_then_stop
        with pytest.raises(DaemonUnavailable):
            decode(model, cache, ids[:, :1], 1)
        with pytest.raises(InvalidInput, match="new_cache"):
            model(ids[:, :1], past_key_values=cache)
        attachment.detach()
        session.close()
    assert not workers()


@torch.inference_mode()
@pytest.mark.parametrize("predictor", ["next_layer", "previous_step"])
def test_requests_ahead_bring_what_the_thread_does(model, daemon, predictor):
    """Logits of two sequences over several append units, with another cache that uses the session between."""
    ids, _ = prompt(2, 500, False)
    seen = []
    for policy, ring in ((None, True), (InItsThread(), True), (None, False)):
        with ExitStack() as stack:
            session = stack.enter_context(hillinfer.Session.connect(daemon.socket, ARENA, ring=ring))
            options = {"budget": 100, "predictor": predictor, "policy": policy}
            attachment = stack.enter_context(hillinfer.attach(model, session=session, **options))
            cache, other, logits = attachment.new_cache(), attachment.new_cache(), []
            model(ids, past_key_values=cache)
            model(ids[:1, :300], past_key_values=other)
            for step in range(40):
                logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
                if step % 3 == 0:
                    logits.append(model(ids[:1, step : step + 1], past_key_values=other).logits)
            seen.append(torch.cat(logits))
            assert cache.pipeline.timeline.sums[WORKER, EVALUATE] > 0
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@torch.inference_mode()
def test_a_step_that_was_interrupted_leaves_nothing_for_the_next_one(model, session):
    """In the first layer, before it holds the token: the cache goes on, with the queries of another token."""
    ids, _ = prompt(1, 600, False)
    logits = []

    def interrupted(*_):
        raise KeyboardInterrupt

    with hillinfer.attach(model, session=session, budget=60, predictor="next_layer") as attachment:
        for stops in (False, True):
            cache = attachment.new_cache()
            decode(model, cache, ids, 4)
            if stops:
                hook = model.model.layers[0].self_attn.register_forward_pre_hook(interrupted)
                with pytest.raises(KeyboardInterrupt):
                    model(torch.tensor([[7]]), past_key_values=cache)
                hook.remove()
                assert cache.pipeline.pending == [0, 1]
            logits.append(model(torch.tensor([[90]]), past_key_values=cache).logits[0, -1])
            assert cache.pipeline.layers[0].own
    torch.testing.assert_close(logits[0], logits[1])


@torch.inference_mode()
def test_the_first_step_after_a_text_sends_what_all_layers_append_at_once(model, session, monkeypatch):
    ids, _ = prompt(1, 599, False)
    append, waited_for = Context.append, []
    monkeypatch.setattr(Context, "append", lambda *these: (waited_for.append(these[1]), append(*these)))
    with hillinfer.attach(model, session=session, budget=100, predictor="next_layer") as attachment:
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)
        (context,) = cache.contexts
        before = [context.length(layer) for layer in range(4)]
        waited_for.clear()
        model(ids[:, :1], past_key_values=cache)
        assert not waited_for
        assert all(context.length(layer) > length for layer, length in enumerate(before))


@torch.inference_mode()
@pytest.mark.parametrize(("policy", "waits"), [(None, True), (InItsThread(), False)])
def test_of_three_requests_the_first_is_waited_for_and_of_a_thread_none(model, session, policy, waits):
    ids, _ = prompt(1, 500, False)
    options = {"budget": 100, "predictor": "next_layer", "policy": policy}
    with hillinfer.attach(model, session=session, **options) as attachment:
        cache = attachment.new_cache()
        decode(model, cache, ids, 3)
        pipeline = cache.pipeline
        pipeline.drop()
        query = torch.zeros(1, 4, 1, 16)
        for layer in cache.full_layers[1:]:
            pipeline.before(layer, lambda: query)
        waited = [pipeline._jobs[index].waited is not None for index in (1, 2, 3)]
        assert waited == [waits, False, False]
        for layer in cache.full_layers[1:]:
            assert pipeline.take(layer, query) is not None


@torch.inference_mode()
@pytest.mark.parametrize("end", ["crop", "save", "a prompt", "close"])
def test_two_requests_under_way_are_waited_for(model, durable_daemon, end):
    """What they asked for is forgotten; the cache goes on as one of which nothing was asked."""
    ids, _ = prompt(1, 500, False)
    query, seen = torch.zeros(1, 4, 1, 16), []
    for number, asked in enumerate((True, False)):
        with (
            hillinfer.Session.connect(durable_daemon.socket, arena_bytes=ARENA) as session,
            hillinfer.attach(model, session=session, budget=100, predictor="next_layer") as attachment,
        ):
            cache = attachment.new_cache(durable=f"{end} {number}")
            decode(model, cache, ids, 3)
            if end == "crop":
                cache.save()
            for layer in cache.full_layers[1:3] if asked else ():
                cache.pipeline.before(layer, lambda: query)
            assert cache.pipeline.pending == ([1, 2] if asked else [])
            if end == "close":
                cache.close()
                continue
            if end == "crop":
                cache.crop(-40)
            elif end == "save":
                cache.save()
            else:
                model(ids[:, :30], past_key_values=cache)
            assert not cache.pipeline.pending
            logits = [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(20)]
            seen.append(torch.stack(logits))
    assert end == "close" or torch.equal(*seen)


@torch.inference_mode()
@pytest.mark.parametrize("told", ["its own", "but for rounding", "a little more", "another's", "none"])
def test_the_first_layer_ranks_with_its_own_query_whatever_is_said_to_be_it(session, monkeypatch, told):
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_hidden_layers": 1})).eval()
    ids, _ = prompt(2, 500, False)

    def say(first, kwargs):
        if told == "none":
            raise UnsupportedModel("nothing to say")
        query = make(first, kwargs)
        scales = {"its own": 1.0, "but for rounding": 1 + 1e-6, "a little more": 1 + 1e-4}
        return query * scales[told] if told in scales else torch.ones_like(query)

    seen, make = [], FirstQuery.__call__
    monkeypatch.setattr(alone, "NATIVE_BYTES", 0)  # so that what is its own is so to the last bit
    monkeypatch.setattr(FirstQuery, "__call__", say)
    for predictor in ("exact", "next_layer", "auto"):
        with hillinfer.attach(model, session=session, budget=100, predictor=predictor) as attachment:
            cache = attachment.new_cache()
            seen.append(decode(model, cache, ids, 20))
            assert attachment._predictions._first.usable == (predictor != "exact")
            expected = predictor == "exact" or told in ("its own", "but for rounding")
            assert cache.pipeline.layers[0].own == expected
            ahead = cache.pipeline.timeline.sums[WORKER, EVALUATE] > 0
            assert ahead == (predictor != "exact")
    if told != "but for rounding":  # which may turn what is equally good into its neighbour
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])


@torch.inference_mode()
def test_the_thread_ends_with_its_cache(model, session):
    ids, _ = prompt(1, 300, False)
    assert not workers()
    with hillinfer.attach(model, session=session, budget=80, predictor="next_layer") as attachment:
        first, second = attachment.new_cache(), attachment.new_cache()
        for cache in (first, second):
            decode(model, cache, ids, 2)
        assert len(workers()) == 2
        first.close()
        first.close()
        assert len(workers()) == 1
    assert not workers()


@torch.inference_mode()
def test_layers_that_are_not_known_rank_with_their_own_query(model, session):
    ids, _ = prompt(1, 300, False)
    odd = copy.deepcopy(model)
    odd.model.layers = torch.nn.ModuleList([*odd.model.layers, torch.nn.Identity()])
    with pytest.raises(UnsupportedModel, match="predictor exact"):
        hillinfer.attach(odd, session=session, predictor="next_layer")
    odd.config._attn_implementation = "sdpa"
    with hillinfer.attach(odd, session=session, budget=80) as attachment:
        cache = attachment.new_cache()
        select, ranking = cache.pipeline.select, set()
        cache.pipeline.select = lambda *asked: ranking.add(threading.current_thread()) or select(*asked)
        decode(odd, cache, ids, 4)
        assert {state.predictor for state in cache.pipeline.layers} == {Predictor.exact}
        assert ranking == {threading.current_thread()}, "nothing is ranked ahead"
    with pytest.raises(InvalidInput, match="next_layer"):
        hillinfer.attach(model, session=session, predictor="oracle")


@torch.inference_mode()
def test_the_first_selection_which_brings_every_row_says_nothing_of_the_time_of_others(model, session):
    ids, _ = prompt(1, 500, False)
    with hillinfer.attach(model, session=session, budget=90, predictor="next_layer") as attachment:
        cache = attachment.new_cache()
        decode(model, cache, ids, 1)
        assert [state.measured.evaluate_s for state in cache.pipeline.layers] == [None] * 4
        model(ids[:, :1], past_key_values=cache)
        assert all(state.measured.evaluate_s for state in cache.pipeline.layers[1:])
