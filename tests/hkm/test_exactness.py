"""At 100 % of the past, all but the pinned tokens read back each step: the tokens of plain transformers."""

import copy

import pytest
import torch
from small_models import COMMON
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hillinfer
from hillinfer_core.errors import (
    BudgetTooSmall,
    InvalidInput,
    ResidentTooSmall,
    UnknownContext,
    UnsupportedModel,
)

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
PINNED, ROW_BYTES = 4 + 32, 2 * HEAD_DIM * 4
ARENA = 1 << 20
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
}


@pytest.fixture(params=list(FAMILIES))
def model(request):
    torch.manual_seed(7)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def session(daemon):
    with hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="exactness") as session:
        yield session


def prompt(batch, tokens, padded):
    torch.manual_seed(batch + tokens)
    ids = torch.randint(1, 97, (batch, tokens))
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        mask[row, : 11 * row] = 0
    return ids * mask, mask


def turns(model, ids, mask, cache, second_turn):
    """Greedy: 64 new tokens, then with `second_turn` 20 more prompt tokens and 64 again."""
    options = {"do_sample": False, "max_new_tokens": 64}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    if second_turn:
        more, _ = prompt(ids.shape[0], 20, False)
        out = torch.cat([out, more], 1)
        mask = torch.cat([mask, torch.ones(ids.shape[0], out.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        out = model.generate(out, attention_mask=mask, past_key_values=cache, **options)
    return out


def least_read(ids, mask, steps, start):
    """Bytes of every row that is not pinned, in each of `steps` decode steps from `start` columns on."""
    padding = (mask == 0).sum(1)
    rows = sum(int((start + step + 1 - padding - PINNED).sum()) for step in range(steps))
    return rows * LAYERS * KV_HEADS * ROW_BYTES


@pytest.mark.parametrize("second_turn", [False, True], ids=["one turn", "two turns"])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_tokens_as_plain_transformers(model, session, batch, second_turn):
    ids, mask = prompt(batch, 333, padded=batch > 1)
    with torch.inference_mode():
        plain = copy.deepcopy(model)
        expected = turns(plain, ids, mask, DynamicCache(config=plain.config), second_turn)
        resident = ARENA + batch * 90 * 1024
        with hillinfer.attach(
            model, session=session, budget="100%", resident=resident, precision="int8"
        ) as attachment:
            cache = attachment.new_cache()
            actual = turns(model, ids, mask, cache, second_turn)
            report = attachment.report()
    assert torch.equal(actual, expected)
    # The first new token of a turn comes from the prompt's own step; 63 decode steps follow.
    assert report.cold_read_bytes >= least_read(ids, mask, 63, 333)
    assert report.resident["hot_pool"] == 0
    assert report.resident_peak_bytes <= resident
    assert report.evaluated_bytes == 0
    assert report.hot_hit_rate == 0


def test_generate_needs_no_cache_argument(model, session):
    ids, mask = prompt(1, 200, False)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    with torch.inference_mode():
        expected = copy.deepcopy(model).generate(ids, **options)
        with hillinfer.attach(model, session=session, budget="100%", precision="int8"):
            actual = model.generate(ids, **options)
        again = model.generate(ids, **options)
    assert torch.equal(actual, expected)
    assert torch.equal(again, expected), "detach must give the model its own attention back"


def test_kept_slots_give_the_same_tokens(model, session):
    """With room for everything in slots, tokens are ranked, fetched once and kept."""
    ids, mask = prompt(3, 333, True)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 64}
    with torch.inference_mode():
        expected = copy.deepcopy(model).generate(ids, **options)
        with hillinfer.attach(model, session=session, budget="100%", resident="64MiB") as attachment:
            actual = model.generate(ids, **options)
            report = attachment.report()
    assert torch.equal(actual, expected)
    assert report.hot_hit_rate > 0.9
    assert report.evaluated_bytes > 0


def test_sparse_steps_stay_within_budget_and_resident(model, session):
    ids, mask = prompt(1, 900, False)
    limit = ARENA + 400 * 1024
    with (
        torch.inference_mode(),
        hillinfer.attach(model, session=session, budget=80, resident=limit) as attachment,
    ):
        cache = attachment.new_cache()
        model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=40)
        for layer in cache.full_layers:
            assert layer.slots.selected + layer.slots.pinned == 80
        report = attachment.report()
    assert 0 < report.resident_peak_bytes <= limit
    assert report.hot_hit_rate > 0


def test_sparse_steps_without_room_for_slots_choose_the_same_tokens(model, session):
    """Selections that live for one layer only, read anew each step, answer like those that stay."""
    ids, mask = prompt(1, 900, False)
    outputs, reports = [], []
    for resident in (ARENA + 200 * 1024, "64MiB"):
        with (
            torch.inference_mode(),
            hillinfer.attach(model, session=session, budget=400, resident=resident) as attachment,
        ):
            outputs.append(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24))
            reports.append(attachment.report())
    assert torch.equal(*outputs)
    assert reports[0].hot_hit_rate == 0
    assert reports[0].resident_peak_bytes <= ARENA + 200 * 1024
    assert reports[0].evaluated_bytes > 0, "it ranks, and does not attend to everything"
    assert reports[1].hot_hit_rate > 0.5


def test_a_failed_or_closed_cache_is_refused(model, session):
    ids, _ = prompt(1, 200, False)
    with hillinfer.attach(model, session=session) as attachment, torch.inference_mode():
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)
        cache.close()
        with pytest.raises(InvalidInput, match="new_cache"):
            model(ids, past_key_values=cache)
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)
        cache.contexts[0].close()
        with pytest.raises(UnknownContext):
            model(ids, past_key_values=cache)
        with pytest.raises(InvalidInput, match="new_cache"):
            model(ids, past_key_values=cache)


@pytest.mark.parametrize("then", ["step", "crop"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_step_that_ends_between_two_layers_is_the_end_of_its_cache(model, session, tokens, then):
    ids, _ = prompt(1, 300, False)
    with hillinfer.attach(model, session=session, budget=80) as attachment, torch.inference_mode():
        cache = attachment.new_cache()
        model(ids, past_key_values=cache)

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[0].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :tokens], past_key_values=cache)
        hook.remove()
        use = {
            "step": lambda: model(ids[:, :1], past_key_values=cache),
            "crop": lambda: cache.crop(-tokens),
        }
        for _ in range(2):
            with pytest.raises(InvalidInput, match="new_cache"):
                use[then]()


def test_one_attachment_at_a_time(model, session):
    first = hillinfer.attach(model, session=session)
    with pytest.raises(InvalidInput, match="detach it first"):
        hillinfer.attach(model, session=session)
    first.detach()
    with hillinfer.attach(model, session=session):
        first.detach()
        assert model.config._attn_implementation == "hillinfer"


def test_what_cannot_be_done_says_so(model, session):
    with pytest.raises(BudgetTooSmall, match="or more"):
        hillinfer.attach(model, session=session, budget=10)
    with pytest.raises(BudgetTooSmall, match="at least 36, or pin fewer"):
        hillinfer.attach(model, session=session, budget=35, sinks=4, recent=32)
    ids, mask = prompt(1, 400, False)
    with torch.inference_mode():
        with (
            hillinfer.attach(model, session=session, budget="50%", resident=ARENA) as attachment,
            pytest.raises(ResidentTooSmall, match="raise resident"),
        ):
            model.generate(ids, past_key_values=attachment.new_cache(), max_new_tokens=4)
        right_padded = mask.clone()
        right_padded[:, -3:] = 0
        with (
            hillinfer.attach(model, session=session) as attachment,
            pytest.raises(UnsupportedModel, match="pad on the left"),
        ):
            model(ids, attention_mask=right_padded, past_key_values=attachment.new_cache())
        hides, left_padded = torch.ones(1, 401, dtype=torch.long), mask.clone()
        hides[:, 20:200] = 0
        left_padded[:, :5] = 0
        for first, later in (
            (None, hides),
            (None, hides[:, :300]),
            (left_padded, None),
            (left_padded, hides),
        ):
            with hillinfer.attach(model, session=session) as attachment:
                cache = attachment.new_cache()
                model(ids, attention_mask=first, past_key_values=cache)
                with pytest.raises(UnsupportedModel, match="attention mask"):
                    model(ids[:, :1], attention_mask=later, past_key_values=cache)
                with pytest.raises(InvalidInput, match="a step of it failed"):
                    model(ids[:, :1], past_key_values=cache)
        with (
            hillinfer.attach(model, session=session) as attachment,
            pytest.raises(UnsupportedModel, match="num_beams=1"),
        ):
            model.generate(ids, num_beams=2, max_new_tokens=4)
