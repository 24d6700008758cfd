"""``examples/benchmark.py --serve`` measures what it says, on the tiny checkpoint and with random weights. No times."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["weights", "gpu", "clocks", "torch", "date", "command"]
LATENCIES = {f"ms_{what}_{share}" for what in ("first_token", "between_tokens") for share in ("p50", "p99")}


@pytest.fixture
def example(monkeypatch):
    """Import one of the examples' modules."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def random_model(example):
    """Return a small model of random weights that has all ids of the 6B shape."""
    from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    small = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "inner_hidden_size": 128}
    torch.manual_seed(0)
    config = ChatGLMConfig(**{**example("measuring.models").CONFIG_6B, **small})
    return ChatGLMForConditionalGeneration(config).float().eval()


@pytest.fixture
def tokenizer():
    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(ROOT / "examples" / "tiny_chatglm")


@pytest.mark.skipif(importlib.util.find_spec("servebench") is None, reason="servebench is not installed (Python 3.11)")
def test_the_tiny_checkpoint_under_load(tmp_path):
    file = tmp_path / "records.json"
    options = ("--prompt-tokens", "12", "--new-tokens", "6", "--requests", "10", "--iters", "1", "--json", str(file))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "examples/benchmark.py", "--serve", "--tiny", "--quick", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text("utf-8"))
    assert [record["kind"] for record in records] == ["offline", "one answer", "http", "http", "mixed", "memory"]
    assert all([*record][-len(COMMON) :] == COMMON for record in records)
    offline, alone, one, eight, mixed, memory = records
    assert (offline["rows"], offline["prompt_tokens"], offline["new_tokens"], offline["requests"]) == (8, 12, 6, 16)
    assert offline["tokens_per_s"] > 0 and alone["ms_first_token_of_1024"] > alone["ms_first_token"] > 0
    for record, clients, requests in ((one, 1, 8), (eight, 8, 16), (mixed, 1, 8)):
        assert (record["clients"], record["requests"]) == (clients, requests)
        assert all(record[name] > 0 for name in LATENCIES) and record["tokens_per_s"] > 0
        assert record["tokens_per_s"] == pytest.approx(6 * record["requests_per_s"], rel=1e-3)
    assert memory["requests"] == 10 and "mb_host_grown" in memory
    *_, throughput, latency = done.stdout.splitlines()
    assert throughput.startswith("8 clients over HTTP: ") and latency.startswith("one client over HTTP: ")


def test_prompts_have_the_tokens_that_are_asked_for(example, tokenizer):
    made = example("measuring.serving_prompts").prompts_of(tokenizer, 20, 33)
    conversations = [[{"role": "user", "content": text}] for text in made]
    ids = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    assert {len(one) for one in ids} == {33} and len(set(made)) == 20
    assert made == example("measuring.serving_prompts").prompts_of(tokenizer, 20, 33)


def test_random_weights_answer_with_a_text_for_each_token(example, random_model):
    from faster_chatglm_6b.serving.offline import answer_many

    prompts = example("measuring.serving_prompts")
    tokenizer = prompts.tokenizer_for(random_model)
    texts = prompts.prompts_of(tokenizer, 3, 20)
    found = [*answer_many(random_model, tokenizer, texts, max_tokens=9, ignore_eos=True, temperature=0)]
    assert [len(one.text) for one in found] == [9] * 3 and not any(one.error for one in found)


def test_a_tester_that_is_missing_is_one_sentence(example, monkeypatch):
    benchmark = example("benchmark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(SystemExit, match="pip install servebench"):
        example("measuring.serving").run(benchmark.parse(["--serve", "--tiny"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--serve", "--table"], "leave --table out"),
        (["--serve", "--device", "cpu"], "leave --device out"),
        (["--serve", "--no-fast"], "leave --backend torch out"),
        (["--serve", "--batch", "2"], "leave --batch out"),
        (["--serve", "--stream"], "leave --sample and --stream out"),
        (["--requests", "5"], "--requests belongs to --serve"),
    ],
)
def test_options_that_do_not_go_with_it(example, words, said, capsys):
    with pytest.raises(SystemExit):
        example("benchmark").parse(words)
    assert said in capsys.readouterr().err


def test_the_whole_plan_is_the_one_of_the_records(example):
    parse, plan_of = example("benchmark").parse, example("measuring.serving").plan_of
    plan = plan_of(parse(["--serve"]))
    assert plan.clients == (1, 8, 32, 128, 256) and plan.rows == (64, 128, 256)
    assert plan.lengths == ((20, 128), (128, 128)) and plan.requests == 2000
    assert plan_of(parse(["--serve", "--requests", "10000"])).requests == 10000
