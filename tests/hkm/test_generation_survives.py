"""A daemon restarted while a model generates over a saved context: the same tokens, or a typed error."""

import signal
import tempfile
from pathlib import Path

import pytest
import torch
from restartable import restartable
from small_models import COMMON
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import hillinfer
from hillinfer_core.errors import ContextLost, InvalidInput

TEXT = 600
NEW = 64


@pytest.fixture(scope="module")
def daemon():
    with tempfile.TemporaryDirectory(prefix="hd-") as directory, restartable(Path(directory)) as running:
        yield running


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    config = LlamaConfig(**COMMON | {"num_hidden_layers": 3})
    return LlamaForCausalLM(config).eval()


class Restarting(LogitsProcessor):
    """Restarts the daemon between two steps."""

    def __init__(self, daemon, end, after):
        self.daemon, self.end, self.left = daemon, end, after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            self.daemon.restart(self.end)
        return scores


def tokens(count, seed):
    torch.manual_seed(seed)
    return torch.randint(1, 97, (1, count))


def generate(model, cache, ids, count, *watching):
    return model.generate(
        ids,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=count,
        logits_processor=LogitsProcessorList(watching),
    )


@pytest.mark.parametrize(("predictor", "cpu_share"), [("exact", None), ("next_layer", None), ("exact", 0.5)])
def test_the_same_tokens_come_over_a_saved_context(daemon, model, predictor, cpu_share):
    name = f"{predictor} {cpu_share}"
    ids, question = tokens(TEXT, 0), tokens(7, 1)
    asked = torch.cat([ids, question], 1)
    with (
        # Of what is appended after the saved context: three layers, some units of 32 tokens of 256 bytes.
        hillinfer.Session.connect(
            daemon.socket, arena_bytes=1 << 20, restart_s=20, keep_bytes=128 << 10
        ) as session,
        hillinfer.attach(
            model,
            session=session,
            budget=64,
            resident="2MiB",
            predictor=predictor,
            cpu_share=cpu_share,
        ) as attachment,
        torch.inference_mode(),
    ):
        writer = attachment.new_cache(durable=name)
        model(ids, past_key_values=writer, logits_to_keep=1)
        writer.save()
        writer.close()
        right = generate(model, attachment.new_cache(base=name), asked, NEW)
        for end, after in ((signal.SIGKILL, 1), (signal.SIGTERM, 40)):
            cache = attachment.new_cache(base=name)
            found = generate(model, cache, asked, NEW, Restarting(daemon, end, after))
            assert found.tolist() == right.tolist()
            cache.close()
        cache = attachment.new_cache(base=name)
        with daemon.restarted_meanwhile(signal.SIGKILL, 0.02):
            found = generate(model, cache, asked, NEW)
        assert found.tolist() == right.tolist()
        assert session.restarts >= 2
        split = attachment.report().split
        assert (split is not None and split.cpu_share > 0) == (cpu_share is not None)


def test_rows_that_only_the_daemon_had_end_the_cache_and_not_the_attachment(daemon, model):
    ids = tokens(TEXT, 0)
    with (
        hillinfer.Session.connect(daemon.socket, arena_bytes=1 << 20, restart_s=20) as session,
        hillinfer.attach(model, session=session, budget=64, resident="2MiB") as attachment,
        torch.inference_mode(),
    ):
        right = generate(model, attachment.new_cache(), ids, NEW)
        cache = attachment.new_cache()
        daemon.wait()
        with pytest.raises(ContextLost, match="append them again"):
            generate(model, cache, ids, NEW, Restarting(daemon, signal.SIGKILL, 3))
        with pytest.raises(InvalidInput, match="begin with new_cache"):
            generate(model, cache, ids, NEW)
        assert generate(model, attachment.new_cache(), ids, NEW).tolist() == right.tolist()
