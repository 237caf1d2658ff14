"""A layer's predicted query is the query that the layer itself makes of the same input, in every family."""

import pytest
import torch
from test_model_families import FAMILIES, tiny
from transformers.models.llama import modeling_llama

import hillinfer
from hillinfer.hkm.layer import HierarchicalLayer
from hillinfer.pipeline import alone
from hillinfer.pipeline import query as pipeline_query
from hillinfer.pipeline.alone import InTorch, Native, is_same
from hillinfer.pipeline.query import LayerQuery, decoder_layers, is_taking, layer_query, predictable


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_query_is_the_layers_own(daemon, name):
    model = tiny(*FAMILIES[name])
    layers = decoder_layers(model)
    predicted, own = {}, {}

    def hook(number):
        def take(module, args, kwargs):
            if not is_taking():
                predicted[number] = layer_query(module, args, kwargs)

        return take

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook(number), with_kwargs=True)
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with hillinfer.attach(model, socket=daemon.socket, budget=40) as attachment:
        cache = attachment.new_cache()
        numbers = [n for n, layer in enumerate(cache.layers) if isinstance(layer, HierarchicalLayer)]
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.observer = lambda _, layer, query, scaling: own.__setitem__(numbers[layer], query.clone())
        model(
            ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache
        )
        assert cache.get_seq_length() == 61
    assert own, "no layer was seen"
    for number, query in own.items():
        torch.testing.assert_close(predicted[number], query, atol=1e-5, rtol=1e-5)


def test_a_rotation_by_kind_of_layer_is_told_from_one_for_all():
    # The layers of gemma3 rotate by their kind; those of gemma2, mixed as well, do not.
    for name, expected in (("llama", True), ("gemma2", True), ("gemma3", False)):
        model = tiny(*FAMILIES[name])
        assert predictable(model, decoder_layers(model)) == [False, expected], name


NATIVE = ("llama", "mistral", "qwen2", "qwen2 sliding", "qwen3", "granite", "mixtral")
ALONE = (*NATIVE, "gemma", "gemma2")
BOTH_WAYS = pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])


def only_torch(monkeypatch):
    monkeypatch.setattr(alone, "NATIVE_BYTES", 0)


@torch.inference_mode()
@BOTH_WAYS
@pytest.mark.parametrize("name", FAMILIES)
def test_the_query_alone_is_the_layers_own(daemon, monkeypatch, name, native):
    """Bit for bit with torch, whose sums are the layer's; in native code but for rounding."""
    if not native:
        only_torch(monkeypatch)
    model = tiny(*FAMILIES[name])
    layers, compared = decoder_layers(model), []
    queries = [LayerQuery(layer, number) for number, layer in enumerate(layers)]

    def take(module, args, kwargs):
        if not is_taking():
            number = layers.index(module)
            own, query = layer_query(module, args, kwargs), queries[number](args, kwargs)
            compared.append(is_same(query, own) if native else torch.equal(query, own))

    for layer in layers:
        layer.register_forward_pre_hook(take, with_kwargs=True)
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(2))
    with hillinfer.attach(model, socket=daemon.socket, budget=40) as attachment:
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)
        for step in range(5):
            model(ids[:, step : step + 1], past_key_values=cache)
    assert len(compared) == 6 * len(layers)
    assert all(compared)
    if name in ALONE:
        assert all(query.alone for query in queries)
    expected = ([Native] if native and name in NATIVE else []) + ([InTorch] if name in ALONE else [])
    if name in ALONE or name == "phi3":
        assert all([type(way) for way in query.ways] == expected for query in queries)


def assert_given_up(daemon, model, layer, change):
    """The query alone of `layer`, the second, is its own until `change`, and is found out soon after it."""
    query, same = LayerQuery(layer, 1), []

    def take(module, args, kwargs):
        if not is_taking():
            same.append(is_same(query(args, kwargs), layer_query(layer, args, kwargs)))

    model.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    ids = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(2))
    with hillinfer.attach(model, socket=daemon.socket, budget=40) as attachment:
        cache = attachment.new_cache()
        model(ids[:, :10], past_key_values=cache)
        assert query.alone
        change()
        for step in range(8):
            model(ids[:, 10 + step : 11 + step], past_key_values=cache)
    assert not query.alone
    assert False in same[1:4]
    assert all(same[4:])


@torch.inference_mode()
def test_a_query_alone_that_is_another_one_is_given_up(daemon, monkeypatch):
    """A layer that scales its query from some position on, as some do, is found out when compared again."""
    monkeypatch.setattr(pipeline_query, "_COMPARED_EVERY", 4)
    model, scale = tiny(*FAMILIES["llama"]), 1.0
    layer = model.model.layers[1]
    project = layer.self_attn.q_proj

    class Scaled(torch.nn.Module):
        def forward(self, hidden):
            return project(hidden) * (scale if is_taking() else 1.0)

    layer.self_attn.q_proj = Scaled()

    def change():
        nonlocal scale
        scale = 2.0

    assert_given_up(daemon, model, layer, change)


@torch.inference_mode()
@BOTH_WAYS
def test_a_layer_that_comes_to_rotate_otherwise_is_given_up(daemon, monkeypatch, native):
    """With all its parts as they were."""
    if not native:
        only_torch(monkeypatch)
    monkeypatch.setattr(pipeline_query, "_COMPARED_EVERY", 4)
    rotate, turned = modeling_llama.apply_rotary_pos_emb, 0.0

    def rotate_otherwise(query, key, cos, sin, *more):
        query, key = rotate(query, key, cos, sin, *more)
        return query + turned * query.roll(1, -1), key

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_otherwise)
    model = tiny(*FAMILIES["llama"])
    layer = model.model.layers[1]

    def change():
        nonlocal turned
        turned = 1e-3

    assert_given_up(daemon, model, layer, change)


@torch.inference_mode()
def test_parts_that_native_code_does_not_know_are_left_to_torch_from_then_on(daemon):
    model = tiny(*FAMILIES["llama"])
    layer = model.model.layers[1]
    query, same, ways = LayerQuery(layer, 1), [], []

    def take(module, args, kwargs):
        if not is_taking():
            same.append(is_same(query(args, kwargs), layer_query(layer, args, kwargs)))
            ways.append([type(way) for way in query.ways])

    model.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    ids = torch.randint(1, 97, (1, 20), generator=torch.Generator().manual_seed(2))
    with hillinfer.attach(model, socket=daemon.socket, budget=40) as attachment:
        cache = attachment.new_cache()
        model(ids[:, :10], past_key_values=cache)
        for step in range(4):
            if step == 2:
                layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output * 3)
            model(ids[:, 10 + step : 11 + step], past_key_values=cache)
    assert all(same)
    assert ways == [[Native, InTorch]] * 3 + [[InTorch]] * 2


FIRST_IS_FULL = [name for name in FAMILIES if name not in ("qwen2 sliding", "gemma2", "cohere2")]
EARLY = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


@torch.inference_mode()
@BOTH_WAYS
@pytest.mark.parametrize("name", FIRST_IS_FULL)
@pytest.mark.parametrize("padded", [False, True])
def test_the_first_layer_selects_the_same_asked_ahead_or_not(daemon, monkeypatch, name, padded, native):
    if not native:
        only_torch(monkeypatch)
    model, seen = tiny(*FAMILIES[name]), []
    ids = torch.randint(1, 97, (2, 130), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, : 9 * padded] = 0
    for predictor in ("exact", "next_layer"):
        chosen = []
        with hillinfer.attach(model, socket=daemon.socket, budget=50, predictor=predictor) as attachment:
            cache = attachment.new_cache()
            cache.observer = lambda cache, layer, query, scaling, to=chosen: to.append(
                [{*head} for row in cache.full_layers[0].slots.ids for head in row] if layer == 0 else None
            )
            given = mask
            model(ids, attention_mask=given, past_key_values=cache)
            for step in range(20):
                given = torch.nn.functional.pad(given, (0, 1), value=1)
                model(ids[:, step : step + 1], attention_mask=given, past_key_values=cache)
            if predictor == "next_layer" and name in EARLY:
                assert attachment._predictions._first.usable
                assert cache.pipeline.layers[0].own
        seen.append([each for each in chosen if each is not None])
    assert any(each for step in seen[0] for each in step)
    if not native:
        assert seen[0] == seen[1]
        return
    # Rounding may turn what is equally good into its neighbour.
    one, other = ({(step, head, token) for step, heads in enumerate(each) for head, tokens in enumerate(heads)
                   for token in tokens} for each in seen)  # fmt: skip
    assert len(one ^ other) <= 0.01 * len(one)
