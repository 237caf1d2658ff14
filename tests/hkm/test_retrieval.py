"""Answers about notes hidden in real text: 2 % of the past, full attention, recent tokens only."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hillinfer
from hillinfer.filler import filler_lines
from hillinfer.hkm.policy import RecentOnly
from hillinfer.model_directory import bundled_model
from hillinfer.tasks import hide, make_tasks

NOTES, TOKENS, SINKS = 4, 4096, 4
BUDGET = TOKENS * 2 // 100


@pytest.fixture(scope="module")
def bundled():
    directory = bundled_model()
    # float32: several times faster than bfloat16 on processors without instructions for it.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(directory), model


@torch.inference_mode()
def right(tokenizer, model, make_cache, texts):
    """How many questions about the notes in so many real texts are answered rightly, each alone."""
    count = 0
    for seed in range(texts):
        tasks = make_tasks(NOTES, seed)
        text = hide([task.note for task in tasks], filler_lines(tokenizer, TOKENS - 120, seed), seed)
        past = tokenizer(text).input_ids
        cache = make_cache()
        # The text first, with the questions after it on a context that is cold by then.
        model(torch.tensor([past]), past_key_values=cache, logits_to_keep=1)
        for task in tasks:
            asked = tokenizer("\n" + task.question, add_special_tokens=False).input_ids
            ids = torch.tensor([past + asked])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=16
            )
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            count += task.is_right(answer.split("\n")[0])
            cache.crop(len(past) - cache.get_seq_length())
    return count


@pytest.mark.timeout(600)
@pytest.mark.parametrize("texts", [2, pytest.param(8, marks=pytest.mark.long)])
def test_as_many_right_as_with_full_attention(daemon, bundled, texts):
    tokenizer, model = bundled
    full = right(tokenizer, model, lambda: DynamicCache(config=model.config), texts)
    with hillinfer.attach(model, socket=daemon.socket, budget="2%") as attachment:
        sparse = right(tokenizer, model, attachment.new_cache, texts)
    with hillinfer.attach(
        model, socket=daemon.socket, budget=BUDGET, recent=BUDGET - SINKS, policy=RecentOnly()
    ) as attachment:
        recent = right(tokenizer, model, attachment.new_cache, texts)
    asked = NOTES * texts
    print(f"right of {asked}: full {full}, 2 % {sparse}, recent only {recent}")
    assert full >= asked - texts // 2
    assert abs(sparse - full) <= texts // 2
    assert recent <= texts // 2
