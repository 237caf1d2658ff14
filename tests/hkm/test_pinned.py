"""Small budgets: the pinned tokens leave room for selected ones, and the budget is what is attended."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.eval.metrics import Attended
from hillinfer.pinned import RECENT, SINKS, pinned_within
from hillinfer_core.errors import BudgetTooSmall


@pytest.mark.parametrize("append_unit", [16, 32, 64])
def test_at_most_half_of_the_budget_but_for_a_window_of_an_append_unit(append_unit):
    for budget in range(append_unit + 2, 4 * append_unit + 100):
        sinks, recent = pinned_within(budget, append_unit)
        assert 1 <= sinks <= SINKS
        assert append_unit <= recent <= max(RECENT, append_unit)
        assert sinks + recent < budget
        assert sinks + recent <= max(budget // 2, 1 + append_unit)
    assert pinned_within(2 * (SINKS + RECENT), 16) == (SINKS, RECENT)


def test_less_than_a_window_a_sink_and_one_to_select_is_refused():
    assert pinned_within(18, 16) == (1, 16)
    with pytest.raises(BudgetTooSmall, match="18 tokens or more"):
        pinned_within(17, 16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    # Rows of 256 bytes, so that they are appended 16 at a time.
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
@pytest.mark.parametrize("budget", [18, 21, 40, 60])
def test_every_step_attends_to_as_many_tokens_as_the_budget_says(daemon, model, budget):
    ids = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(1))
    with hillinfer.attach(model, socket=daemon.socket, budget=budget, predictor="exact") as attachment:
        cache, attended = attachment.new_cache(), Attended()
        model(ids, past_key_values=cache)
        cache.observer = attended.observe
        for step in range(40):
            model(ids[:, step : step + 1], past_key_values=cache)
    assert (attended.most, attended.take()) == (budget, budget)
