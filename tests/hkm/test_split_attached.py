"""An attached model whose ranking is split: the same tokens, its mirrored keys held and counted."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.split.ranking import SplitRanking
from hillinfer_core.errors import InvalidInput

LIMIT = 1 << 20


def model_and_prompt():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 97, (1, 1500), generator=torch.Generator().manual_seed(1))
    return model, prompt


def generate(daemon, policy, **options):
    model, prompt = model_and_prompt()
    with (
        hillinfer.Session.connect(daemon.socket) as session,
        hillinfer.attach(
            model, session=session, budget=200, resident="16MiB", policy=policy, **options
        ) as attachment,
    ):
        tokens = model.generate(prompt, max_new_tokens=40, do_sample=False)
        return tokens, attachment.report()


def test_a_split_ranking_changes_no_token_and_counts_as_resident(daemon):
    expected, plain = generate(daemon, None)
    policy = SplitRanking(0.5, LIMIT)
    tokens, report = generate(daemon, policy)
    assert torch.equal(tokens, expected)
    assert "mirrored_keys" not in plain.resident
    assert 0 < report.resident["mirrored_keys"] <= LIMIT
    assert report.resident_peak_bytes <= 16 << 20
    split = policy.report()
    assert all(each.cpu_tokens > 0 for each in split.boundaries.values())
    assert set(split.measured_imbalance) == {0, 1}
    policy.close()


def test_attach_splits_by_itself_within_what_resident_leaves(daemon):
    expected, plain = generate(daemon, None, predictor="exact")
    assert plain.split is None
    tokens, report = generate(daemon, None, predictor="exact", cpu_share=0.5)
    assert torch.equal(tokens, expected)
    assert report.resident_peak_bytes <= 16 << 20
    assert report.split.boundaries == {"fixed": 2}
    assert 0.2 < report.split.cpu_share < 0.5  # whole blocks, none in the first step
    # What the boundary asks for and no more: a block besides for each layer.
    assert 0 < report.resident["mirrored_keys"] <= 2 * (1024 + 256) * 2 * 16 // 2
    tokens, report = generate(daemon, None, predictor="exact", cpu_share="auto")
    assert torch.equal(tokens, expected)
    assert sum(report.split.boundaries.values()) == 2


def test_mirrored_keys_end_with_the_attachment(daemon):
    model, prompt = model_and_prompt()
    with hillinfer.Session.connect(daemon.socket) as session:
        attachment = hillinfer.attach(model, session=session, budget=200, resident="16MiB", cpu_share=0.5)
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        first = attachment.last_cache.policy
        model.generate(prompt, max_new_tokens=8, do_sample=False)
        second = attachment.last_cache.policy
        assert first is not second  # its times are of one cache
        assert second.mirrored_bytes > 0
        attachment.detach()
        assert second.mirrored_bytes == first.mirrored_bytes == 0


@pytest.mark.parametrize("options", [{"min_mass": 0.9}, {"policy": SplitRanking(0.5)}])
def test_a_cpu_share_is_of_a_ranking_by_budget(options):
    model, _ = model_and_prompt()
    with pytest.raises(InvalidInput, match="cpu_share"):
        hillinfer.attach(model, cpu_share="auto", **options)


@pytest.mark.parametrize("share", ["all", 1.5, -0.1, "nan"])
def test_a_cpu_share_out_of_range_is_refused(share):
    model, _ = model_and_prompt()
    with pytest.raises(InvalidInput, match="auto, or 0 to 1"):
        hillinfer.attach(model, cpu_share=share)
