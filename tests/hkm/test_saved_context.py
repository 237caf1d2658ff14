"""A context saved under a name: who begins with it goes on as the one who wrote it, token for token."""

import copy

import pytest
import torch
from small_models import COMMON
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hillinfer
from hillinfer.fingerprint import model_fingerprint, tokens_fingerprint
from hillinfer.hkm.slots import EMPTY
from hillinfer.private_daemon import PrivateDaemon
from hillinfer_core.errors import (
    ContextInUse,
    ContextMismatch,
    InvalidInput,
    UnknownContext,
    UnsupportedModel,
)

ARENA = 1 << 20
TIGHT = ARENA + 100 * 1024
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
}
LABELS = {"text": "the text"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with PrivateDaemon(pool_capacity=128 << 20, pool_dir=tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="saved") as session:
        yield session
        for each in session.list_contexts():
            session.delete_context(each.name)


@pytest.fixture
def model():
    return made("llama")


def made(family):
    torch.manual_seed(7)
    return FAMILIES[family]().eval()


def tokens(count, seed=0):
    torch.manual_seed(seed)
    return torch.randint(1, 97, (1, count))


def read(model, cache, ids, chunk=300):
    for part in ids.split(chunk, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


def answers(model, cache, ids):
    """Two questions, 16 tokens answered to each: all tokens, and the scores that led to them."""
    scores = []
    for question in (tokens(9, 1), tokens(1, 2)):
        ids = torch.cat([ids, question], 1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else tokens like the padding's would be hidden
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=16,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences
        scores.append(torch.cat(out.scores))
    return ids, torch.cat(scores)


def everything(cache):
    """All rows of all layers, and what the slots hold."""
    [context] = cache.contexts
    layers = range(context.shape.layers)
    return (
        [context.fetch_range(layer, 0, context.length(layer)) for layer in layers],
        [(each.slots.ids, each.slots.lengths) for each in cache.full_layers],
        [(each.slots.keys, each.slots.values) for each in cache.full_layers],
    )


def assert_same(one, two):
    for a, b in zip(one[0], two[0], strict=True):
        assert (a == b).all()
    for a, b in zip(one[1], two[1], strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
    for a, b in zip(one[2], two[2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("family", "length", "resident"),
    [
        pytest.param("llama", 1000, "64MiB", id="with a tail"),
        pytest.param("qwen3", 992, "64MiB", id="without a tail"),
        pytest.param("llama", 20, "64MiB", id="fewer tokens than are pinned"),
        pytest.param("qwen3", 901, "64MiB", id="the last step was of one token and selected"),
        pytest.param("llama", 1000, TIGHT, id="no room for slots"),
    ],
)
@torch.inference_mode()
def test_the_same_to_the_bit_as_in_the_run_that_saved(daemon, session, family, length, resident):
    ids, model = tokens(length), made(family)
    # `auto` follows measured times, which are never the same twice.
    options = {"budget": 100, "resident": resident, "predictor": "exact"}
    with hillinfer.attach(model, session=session, **options) as attachment:
        cache = attachment.new_cache(durable="book", labels=LABELS)
        read(model, cache, ids)
        cache.save()
        expected = answers(model, cache, ids)
        state = everything(cache)
    model = made(family)
    with (
        hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA) as again,
        hillinfer.attach(model, session=again, **options) as attachment,
    ):
        cache = attachment.new_cache(base="book", labels=LABELS)
        assert cache.get_seq_length() == length
        assert again.counters.written_bytes == 0
        new, scores = answers(model, cache, ids)
        assert torch.equal(new, expected[0])
        assert torch.equal(scores, expected[1])
        assert_same(everything(cache), state)
    if length > 900:
        assert any((layer_ids != EMPTY).any() for layer_ids, _ in state[1]) == (resident == "64MiB")


@torch.inference_mode()
def test_other_pinned_tokens_than_the_writers_are_exact_at_full_budget(session, model):
    ids = tokens(700)
    with hillinfer.attach(model, session=session) as attachment:
        cache = attachment.new_cache(durable="book")
        read(model, cache, ids)
        cache.save()
    question = torch.cat([ids, tokens(9, 1)], 1)
    expected = model.generate(question, do_sample=False, max_new_tokens=16)
    with hillinfer.attach(model, session=session, budget="100%", sinks=9, recent=70) as attachment:
        cache = attachment.new_cache(base="book")
        actual = model.generate(question, past_key_values=cache, do_sample=False, max_new_tokens=16)
    assert torch.equal(actual, expected)


@torch.inference_mode()
def test_what_differs_is_refused(session, model):
    with hillinfer.attach(model, session=session) as attachment:
        cache = attachment.new_cache(durable="book", labels=LABELS)
        read(model, cache, tokens(200))
        cache.save()
        for labels in ({"text": "another"}, {}, None, LABELS | {"more": ""}):
            with pytest.raises(ContextMismatch, match=r"text|more"):
                attachment.new_cache(base="book", labels=labels)
    with (
        hillinfer.attach(model, session=session, precision="int8") as attachment,
        pytest.raises(ContextMismatch, match="int4"),
    ):
        attachment.new_cache(base="book", labels=LABELS)
    trained = copy.deepcopy(model)
    trained.model.layers[1].self_attn.k_proj.weight.data += 1e-3
    halved = copy.deepcopy(model).to(torch.bfloat16)
    for other, named in [(trained, "model"), (made("qwen3"), "model"), (halved, "dtype")]:
        with (
            hillinfer.attach(other, session=session) as attachment,
            pytest.raises(ContextMismatch, match=f"differs in {named}"),
        ):
            attachment.new_cache(base="book", labels=LABELS)


@torch.inference_mode()
def test_rows_of_another_shape_are_refused_whatever_the_labels_say(session, model, monkeypatch):
    monkeypatch.setattr("hillinfer.attachment.model_fingerprint", lambda model: "any")
    with hillinfer.attach(model, session=session) as attachment:
        cache = attachment.new_cache(durable="book")
        read(model, cache, tokens(200))
        cache.save()
    other = LlamaForCausalLM(LlamaConfig(**{**COMMON, "head_dim": 32})).eval()
    with hillinfer.attach(other, session=session) as attachment:
        cache = attachment.new_cache(base="book")
        with pytest.raises(ContextMismatch, match=r"head_dim=16.*head_dim=32"):
            other(tokens(3), past_key_values=cache)


@torch.inference_mode()
def test_what_cannot_be_kept_says_so(session, model):
    ids = tokens(200)
    with hillinfer.attach(model, session=session) as attachment:
        with pytest.raises(UnknownContext, match="book"):
            attachment.new_cache(base="book")
        with pytest.raises(InvalidInput, match="durable=NAME"):
            attachment.new_cache(durable="book").save()
        cache = attachment.new_cache()
        read(model, cache, ids)
        with pytest.raises(InvalidInput, match="durable=NAME"):
            cache.save()
        with pytest.raises(InvalidInput, match="one sequence"):
            read(model, attachment.new_cache(durable="book"), ids.repeat(2, 1))
        cache = attachment.new_cache(durable="padded")
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(InvalidInput, match="padding"):
            cache.save()
        cache.close()
        with pytest.raises(InvalidInput, match="never saved"):
            read(model, attachment.new_cache(durable="padded"), ids)
        writing = attachment.new_cache(durable="book")
        read(model, writing, ids)
        with pytest.raises(ContextInUse):
            read(model, attachment.new_cache(durable="book"), ids)


def test_a_model_with_sliding_windows_is_refused(session):
    settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, **settings)).eval()
    with hillinfer.attach(model, session=session) as attachment:
        for kind in ("durable", "base"):
            with pytest.raises(UnsupportedModel, match="sliding-window"):
                attachment.new_cache(**{kind: "book"})


def test_fingerprints():
    model = made("llama")
    mine = model_fingerprint(model)
    assert mine == model_fingerprint(made("llama"))
    model.set_attn_implementation("eager")
    assert mine == model_fingerprint(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert mine != model_fingerprint(model)
    ids = tokens(5)
    assert tokens_fingerprint(ids) == tokens_fingerprint(ids.to(torch.int32))
    assert tokens_fingerprint(ids) != tokens_fingerprint(ids.flip(1))
