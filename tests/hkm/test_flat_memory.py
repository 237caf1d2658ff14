"""Long generation: what is held stays within `resident`, and the process does not grow."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer

ARENA = 1 << 20
LIMIT = ARENA + 300 * 1024
BUDGET, PROMPT, NEW = 60, 100, 2000


def process_bytes():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.timeout(300)
@torch.inference_mode()
def test_memory_is_flat_over_two_thousand_tokens(daemon):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    seen = []
    with (
        hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA, name="flat") as session,
        hillinfer.attach(model, session=session, budget=BUDGET, resident=LIMIT) as attachment,
    ):
        cache = attachment.new_cache()
        token = model(torch.randint(1, 97, (1, PROMPT)), past_key_values=cache).logits[:, -1:].argmax(-1)
        for number in range(NEW):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            if number % 200 == 199:
                seen.append((cache.resident(), process_bytes()))
        report = attachment.report()
        counted = session.status().device.evaluation_key_bytes
    assert report.full_bytes == (PROMPT + NEW) * 2 * 2 * 16 * 4 > LIMIT - ARENA
    assert report.resident_peak_bytes <= LIMIT
    kinds, _ = seen[-1]
    assert kinds["evaluation_keys"] == counted
    assert kinds["hot_pool"] > 0
    # Slots and buffers never change; evaluation keys and checksums grow, and the hot pool gives way to them.
    assert len({(each["slots"], each["buffers"]) for each, _ in seen}) == 1
    assert kinds["evaluation_keys"] > seen[0][0]["evaluation_keys"]
    assert max(sum(each.values()) for each, _ in seen) <= LIMIT
    # The whole KV would be 0.5 MiB; this is about leaks of the many small things of a step.
    assert seen[-1][1] - seen[1][1] < 16 << 20
