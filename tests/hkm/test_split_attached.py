"""An attached model whose ranking is split: the same tokens, its mirrored keys held and counted."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.split.ranking import SplitRanking

LIMIT = 1 << 20


def generate(daemon, policy):
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
    with (
        hillinfer.Session.connect(daemon.socket) as session,
        hillinfer.attach(model, session=session, budget=200, resident="16MiB", policy=policy) as attachment,
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
