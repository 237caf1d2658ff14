"""`hillinfer run` and `eval` with tiny random models of other families, against plain transformers."""

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hillinfer.cli import main
from hillinfer.eval.conversation import Conversation
from hillinfer.eval.prompts import Question, make_prompt
from hillinfer.model_directory import bundled_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# None of these tells how many KV heads it has; GPT-2 has names of its own for the rest too.
FAMILIES = {
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048, "initializer_range": 0.2}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SMALL,
}
GEMMA3 = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EVAL = ("--context-tokens", 512, "--budget", 80, "--prompts", 1, "--tasks", "single", "--dtype", "float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)


@pytest.fixture
def tiny(tmp_path, tokenizer):
    """Return a function that makes a model directory with the bundled tokeniser, and the model."""

    def make(family, settings):
        torch.manual_seed(5)
        config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family, model

    return make


@pytest.fixture
def hillinfer(tmp_path, monkeypatch, capfd):
    """Return a function that runs a command in this process and returns its exit code, output and errors."""
    monkeypatch.setenv("HILLINFER_RUNTIME_DIR", str(tmp_path / "runtime"))

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["hillinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_run_answers_as_plain_transformers_does(hillinfer, tiny, tokenizer, tmp_path, family):
    directory, model = tiny(family, FAMILIES[family])
    text, question = "VAR misty_harbor := 12345\n" * 30, "print VAR misty_harbor ->"
    (tmp_path / "context.txt").write_text(text)
    given = ("--model", directory, "--context", tmp_path / "context.txt", "--ask", question)
    code, out, err = hillinfer("run", *given, "--budget", "100%", "--json")
    assert code == 0, err
    report = json.loads(out)
    plain = Conversation(model, tokenizer, DynamicCache(config=model.config))
    plain.feed(tokenizer(text)["input_ids"])
    (answer,) = report["answers"]
    assert answer["text"] == plain.ask(Question(question, ("12345",)), 32)
    assert answer["new_tokens"] > 1
    # Two layers, K and V, 64 numbers of 4 bytes for each token.
    assert report["kv"]["full_bytes"] >= report["context_tokens"] * 2 * 2 * 64 * 4


def test_eval_of_a_model_without_grouped_queries(hillinfer, tiny):
    directory, _ = tiny("opt", FAMILIES["opt"])
    code, out, err = hillinfer("eval", "--model", directory, *EVAL, "--policies", "full,hillinfer", "--json")
    assert code == 0, err
    cells = {cell["policy"]: cell["attended_tokens"] for cell in json.loads(out)["cells"]}
    assert cells["full"] > 512
    assert cells["hillinfer"] == 80


def test_a_model_without_attention_is_refused_in_one_line(hillinfer, tiny, tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    directory, _ = tiny("mamba", small)
    (tmp_path / "context.txt").write_text("VAR misty_harbor := 12345\n" * 30)
    for command in (
        (
            "run",
            "--model",
            directory,
            "--context",
            tmp_path / "context.txt",
            "--ask",
            "what?",
            "--budget",
            80,
        ),
        ("eval", "--model", directory, *EVAL),
    ):
        code, out, err = hillinfer(*command)
        assert (code, out) == (2, ""), err
        assert err.startswith("hillinfer: ")
        assert err.count("\n") == 1, err
        assert "not supported" in err


def test_windows_larger_than_what_is_held_of_the_rest(hillinfer, tiny, tmp_path):
    wide = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "sliding_window": 1024}
    directory, _ = tiny("gemma3_text", {**GEMMA3, **wide})
    (tmp_path / "context.txt").write_text("VAR misty_harbor := 12345\n" * 100)
    given = ("--model", directory, "--context", tmp_path / "context.txt", "--ask", "what?", "--budget", 80)
    code, out, err = hillinfer("run", *given, "--json")
    assert code == 0, err
    report = json.loads(out)
    # Two layers, K and V, 16 heads of 256 numbers of 4 bytes.
    windows = 2 * 2 * 16 * 256 * 4 * 1023
    assert report["context_tokens"] > 1023
    assert report["kv"]["resident_peak_bytes"] > windows > 16 << 20


@torch.inference_mode()
def test_eval_of_a_model_with_sliding_windows(hillinfer, tiny, tokenizer, monkeypatch):
    directory, model = tiny("gemma3_text", GEMMA3)
    asked, score = [], Question.score

    def note(question, answer):
        asked.append(answer)
        return score(question, answer)

    monkeypatch.setattr(Question, "score", note)
    policies = ("--policies", "full,hillinfer,h2o,next_layer,recent", "--turns", 2, "--max-new-tokens", 12)
    code, out, err = hillinfer("eval", "--model", directory, *EVAL, *policies, "--perplexity", "--json")
    assert code == 0, err
    report = json.loads(out)
    for cell in report["cells"]:
        assert cell["attended_tokens"] > 512 if cell["policy"] == "full" else cell["attended_tokens"] == 80
    assert len(report["perplexity"]) == 5

    prompt = make_prompt("single", tokenizer, 512, 2, "0 512 0")
    plain = Conversation(model, tokenizer, DynamicCache(config=model.config))
    plain.feed(tokenizer(prompt.context)["input_ids"])
    full = [plain.ask(question, 12) for question in prompt.questions]
    assert asked[:2] == full
    assert any(asked[at : at + 2] != full for at in range(2, len(asked), 2)), "80 tokens are not all of them"
