"""The native query of a layer follows its parts, and serves for nothing else than what it knows."""

import pytest
import torch
from test_model_families import FAMILIES, tiny

from hillinfer.pipeline import alone
from hillinfer.pipeline.alone import InTorch, Native, is_same


def layer_of(name="llama", **options):
    model = tiny(*FAMILIES[name], **options)
    return model, model.model.layers[1]


def given(model, batch=1, tokens=1):
    hidden = torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(3))
    return hidden, model.model.rotary_emb(hidden, torch.arange(700, 700 + tokens)[None])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 4)])
def test_both_ways_are_the_same(name, batch, tokens):
    model, layer = layer_of(name)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)  # a bias of zeros says nothing
    hidden, rotation = given(model, batch, tokens)
    query = Native(layer)(hidden, rotation)
    assert query.dtype == torch.float32
    assert is_same(query, InTorch(layer)(hidden, rotation))
    wide = torch.randn(batch, tokens, 128)[..., ::2]
    assert is_same(Native(layer)(wide, rotation), InTorch(layer)(wide, rotation))


@torch.inference_mode()
def test_not_a_number_stays_one_and_is_like_nothing():
    model, layer = layer_of()
    hidden, rotation = given(model, 2)
    hidden[1, 0, 7] = torch.nan
    query, other = Native(layer)(hidden, rotation), InTorch(layer)(hidden, rotation)
    assert torch.equal(query.isnan(), other.isnan())
    assert query[1].isnan().all()
    assert is_same(query[:1], other[:1])
    assert not is_same(query, query)


def test_an_input_with_gradients_is_only_read():
    model, layer = layer_of()
    hidden, rotation = given(model)
    query = Native(layer)(hidden.requires_grad_(), rotation)
    assert not query.requires_grad
    assert is_same(query, InTorch(layer)(hidden, rotation))


class Wrapped(torch.nn.Module):
    """As a low-rank adapter is put around a projection."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    bias = None

    def forward(self, hidden):
        return self.inner(hidden) * 2


class Special(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 2


def special(project):
    made = Special(64, 64, bias=False)
    made.weight = project.weight  # the same memory
    return made


class Quantised(torch.Tensor):
    """Of which the memory is not what it stands for."""


def quantised(project):
    inner = torch.nn.Parameter(project.weight.data.as_subclass(Quantised), requires_grad=False)
    del project.weight
    project.register_parameter("weight", inner)


CHANGED = {
    "wrapped": lambda layer: setattr(layer.self_attn, "q_proj", Wrapped(layer.self_attn.q_proj)),
    "of another class": lambda layer: setattr(layer.self_attn, "q_proj", special(layer.self_attn.q_proj)),
    "hooked": lambda layer: layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out * 2),
    "hooked before": lambda layer: layer.input_layernorm.register_forward_pre_hook(lambda module, args: args),
    "another forward": lambda layer: setattr(layer.input_layernorm, "forward", lambda hidden: hidden),
    "another norm": lambda layer: setattr(layer, "input_layernorm", torch.nn.RMSNorm(64)),
    "quantised": lambda layer: quantised(layer.self_attn.q_proj),
    "moved": lambda layer: layer.to("meta"),
    "narrowed": lambda layer: layer.bfloat16(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGED)
def test_other_parts_are_noticed(change):
    model, layer = layer_of()
    native, (hidden, rotation) = Native(layer), given(model)
    assert native(hidden, rotation) is not None
    undo = CHANGED[change](layer)
    assert native(hidden, rotation) is None
    if change.startswith("hooked"):
        undo.remove()
        assert native(hidden, rotation) is not None


@torch.no_grad()
def test_other_weights_are_taken():
    model, layer = layer_of()
    native, torchs, (hidden, rotation) = Native(layer), InTorch(layer), given(model)
    project, seen = layer.self_attn.q_proj, [native(hidden, rotation)]
    for change in (
        lambda: project.weight.mul_(1.5),
        lambda: setattr(project.weight, "data", torch.randn(64, 64)),
        lambda: setattr(project, "weight", torch.nn.Parameter(torch.randn(64, 64))),
        lambda: setattr(project, "bias", torch.nn.Parameter(torch.randn(64))),
        lambda: layer.input_layernorm.weight.add_(torch.randn(64)),
        lambda: setattr(layer.self_attn, "q_proj", torch.nn.Linear(64, 64)),
        lambda: layer.bfloat16() and layer.float(),
    ):
        change()
        seen.append(native(hidden, rotation))
        assert is_same(seen[-1], torchs(hidden, rotation))
        assert not is_same(seen[-1], seen[-2])


@torch.inference_mode()
def test_what_is_not_float32_on_the_host_or_takes_threads_is_left_to_torch(monkeypatch):
    model, layer = layer_of()
    native, (hidden, rotation) = Native(layer), given(model, 2)
    assert native(hidden.bfloat16(), rotation) is None
    assert native(hidden, tuple(each.bfloat16() for each in rotation)) is None
    assert native(hidden.to("meta"), rotation) is None
    monkeypatch.setattr(alone, "NATIVE_BYTES", 2 * 64 * 64 * 4)
    assert native(hidden, rotation) is not None
    monkeypatch.setattr(alone, "NATIVE_BYTES", 2 * 64 * 64 * 4 - 1)
    assert native(hidden, rotation) is None
