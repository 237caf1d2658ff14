"""Tiny random models of each family: the logits of plain transformers at 100 %, and sparse steps."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hillinfer
from hillinfer.hkm import interface
from hillinfer.hkm.coverage import check_model
from hillinfer_core.errors import UnsupportedModel

ARENA = 1 << 20
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
NO_HEAD_DIM = {name: value for name, value in SMALL.items() if name != "head_dim"}
MIXED = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    "llama": ("llama", SMALL),
    "mistral": ("mistral", {**SMALL, "sliding_window": None}),
    "qwen2": ("qwen2", NO_HEAD_DIM),
    "qwen2 sliding": ("qwen2", {**NO_HEAD_DIM, **MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", SMALL),
    "phi3": ("phi3", NO_HEAD_DIM),
    "gemma": ("gemma", SMALL),
    # A cap that bites: scores of these models reach 10.
    "gemma2": ("gemma2", {**SMALL, **MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**SMALL, **MIXED, "query_pre_attn_scalar": 16}),
    "cohere2": ("cohere2", {**NO_HEAD_DIM, **MIXED}),
    "olmo2": ("olmo2", NO_HEAD_DIM),
    "granite": ("granite", NO_HEAD_DIM),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**NO_HEAD_DIM, **EXPERTS, "num_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**SMALL, **EXPERTS, "num_experts": 4}),
    "gpt_neox": ("gpt_neox", NO_HEAD_DIM),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "initializer_range": 0.2},
    ),
    "opt": ("opt", {**NO_HEAD_DIM, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
}


def tiny(family, settings, **options):
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{"vocab_size": 97, **settings})
    return AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="families") as session:
        yield session


def conversation(model, cache, padded):
    """Two turns: a prompt in two chunks, then greedy steps. Returns tokens and logits of all of them."""
    batch, mask, logits, taken = 1 + padded, torch.zeros(1 + padded, 0, dtype=torch.long), [], []

    def step(ids, hidden=0):
        nonlocal mask
        new = torch.ones_like(ids)
        new[-1, :hidden] = 0
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {} if model.config.model_type == "gemma3_text" else {"position_ids": positions}
        logits.append(model(ids, attention_mask=mask, past_key_values=cache, **extra).logits[:, -1])
        return logits[-1].argmax(-1, keepdim=True)

    for turn in range(2):
        prompt = torch.randint(1, 97, (batch, 190), generator=torch.Generator().manual_seed(turn))
        step(prompt[:, :111], 23 * padded)
        token = step(prompt[:, 111:])
        for _ in range(8):
            taken.append(token)
            token = step(token)
    return torch.cat(taken, 1), torch.stack(logits)


@torch.inference_mode()
@pytest.mark.parametrize("padded", [False, True], ids=["one sequence", "padded batch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_everything_attended_gives_the_logits_of_plain_transformers(session, name, padded):
    model = tiny(*FAMILIES[name])
    model.set_attn_implementation("eager")
    expected, wanted = conversation(model, DynamicCache(config=model.config), padded)
    with hillinfer.attach(
        model, session=session, budget="100%", resident=ARENA + (200 + 150 * padded) * 1024, precision="int8"
    ) as attachment:
        actual, got = conversation(model, attachment.new_cache(), padded)
        report = attachment.report()
    assert torch.equal(actual, expected)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    assert report.cold_read_bytes > 0
    assert model.config._attn_implementation == "eager"


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_sparse_steps_attend_to_the_budget(session, name):
    model = tiny(*FAMILIES[name])
    ids = torch.randint(1, 97, (1, 600))
    with hillinfer.attach(model, session=session, budget=80) as attachment:
        cache = attachment.new_cache()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
            max_new_tokens=12, min_new_tokens=12,
        )  # fmt: skip
        assert out.shape[1] == 612
        for layer in cache.full_layers:
            assert layer.slots.selected + layer.slots.pinned == 80
            assert torch.isfinite(layer.slots.keys).all()
        assert 0 < attachment.report().hot_hit_rate < 1
        sliding = [layer for layer in cache.layers if layer.is_sliding]
        assert len(sliding) + len(cache.full_layers) == 2
        assert all(layer.keys.shape[2] == 39 for layer in sliding)


REFUSED = {
    "deepseek_v3": ({}, "latent attention"),
    "minicpm3": ({}, "latent attention"),
    "mamba": ({}, "recurrent state"),
    "mamba2": ({}, "recurrent state"),
    "jamba": ({}, "recurrent state"),
    "bamba": ({}, "recurrent state"),
    "rwkv": ({}, "recurrent state"),
    "qwen3_next": ({}, "recurrent state"),
    "bloom": ({}, "attention interface.*ALiBi"),
    "mpt": ({}, "attention interface.*ALiBi"),
    "gptj": ({}, "attention interface"),
    "gpt_oss": ({}, "learned sinks"),
    "diffllama": ({}, "twice"),
    "doge": ({}, "mask of its own"),
    "jetmoe": ({}, "repeats the keys"),
    "bert": ({}, "not causal"),
    "mimo_v2_flash": ({}, "different head dimensions"),
    "gemma4_text": ({}, "different numbers|share the KV|dimension is 512"),
    "mistral": ({"sliding_window": 64}, "sliding window"),
    "llama": ({"head_dim": 12}, "head dimension is 12"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(family):
    settings, reason = REFUSED[family]
    config = AutoConfig.for_model(family, **settings)
    small = {name: value for name, value in SMALL.items() if name in ("vocab_size", "intermediate_size")}
    for name, value in small.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=rf"{type(model).__name__} is not supported: .*({reason})"):
        check_model(model)


def test_encoder_decoders_are_refused_by_name():
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config())
    with pytest.raises(UnsupportedModel, match=r"T5ForConditionalGeneration .* encoder-decoder"):
        hillinfer.attach(model)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_that_is_not_causal_stays_so(softcap):
    """A vision tower, say: the model's attention is changed for it too, its KV is not ours."""
    torch.manual_seed(3)
    module = torch.nn.Module()
    module.is_causal = False
    query, key, value = (torch.randn(1, 2, 9, 16) for _ in range(3))
    got, _ = interface.attention(module, query, key, value, None, scaling=0.5, softcap=softcap)
    scores = query @ key.transpose(-1, -2) * 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    torch.testing.assert_close(got, (scores.softmax(-1) @ value).transpose(1, 2))


def test_what_slips_through_is_refused_at_its_first_token(session):
    """Keys or values that change after the cache, an attention asked twice, scores with a bias or sinks."""
    model = tiny(*FAMILIES["llama"])
    query = torch.randn(1, 4, 5, 16)
    with hillinfer.attach(model, session=session, budget="100%") as attachment:
        for change, options, reason in (
            (lambda key, value: (key.clone(), value), {}, "changes keys or values"),
            (lambda key, value: (key, value.clone()), {}, "changes keys or values"),
            (lambda key, value: (key, value), {"s_aux": torch.zeros(4)}, "sinks"),
            (lambda key, value: (key, value), {"position_bias": torch.zeros(1)}, "bias"),
        ):
            states = attachment.new_cache().update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
            with pytest.raises(UnsupportedModel, match=reason):
                interface.attention(model, query, *change(*states), None, scaling=0.25, **options)
        states = attachment.new_cache().update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
        interface.attention(model, query, *states, None, scaling=0.25)
        with pytest.raises(UnsupportedModel, match="more than once"):
            interface.attention(model, query, *states, None, scaling=0.25)
