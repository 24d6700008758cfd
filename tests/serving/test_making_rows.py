"""Which rows a model gets, and in how much memory."""

import logging

import pytest
import torch

from faster_chatglm_6b.serving.offline import answer_many
from faster_chatglm_6b.serving.rows import making
from faster_chatglm_6b.serving.rows.making import make_rows
from faster_chatglm_6b.serving.rows.plain import PlainRows

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
QUERIES = ["你好", "What is int8?", "What is the capital of France?", "1+2", "Tell me a joke", "Who are you?"]


def gpu_case(*values):
    return pytest.param(*values, marks=on_gpu)


def test_on_a_cpu_rows_share_a_step(chat_model, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        rows = make_rows(chat_model, 2, 0.5, "auto")
    assert type(rows).__name__ == "CapturedRows" and rows.rows == 2 and rows.pages == 2 * 32
    assert "2 rows, keys and values of 4096 tokens" in caplog.text and "steps were captured" not in caplog.text
    monkeypatch.setattr(making, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(ValueError, match="Raise --memory"):
        make_rows(chat_model, 2, 0.5)


def test_without_kernels_rows_are_plain_and_the_log_says_why(chat_model, caplog, monkeypatch):
    monkeypatch.setenv("FASTER_CHATGLM_6B_KERNELS", "off")
    with caplog.at_level(logging.WARNING):
        rows = make_rows(chat_model, 2, 0.5)
    assert type(rows) is PlainRows and rows.rows == 2
    assert "one after the other" in caplog.text and "KERNELS=off" in caplog.text and "speculate" not in caplog.text
    with caplog.at_level(logging.WARNING):
        make_rows(chat_model, 2, 0.5, "auto")
    assert caplog.text.count("speculate is auto, which changes nothing there") == 1
    with pytest.raises(ValueError, match="speculate is 5, but"):
        make_rows(chat_model, 2, 0.5, 5)


@pytest.fixture(scope="module")
def tiny_on_gpu():
    """Load the trained tiny checkpoint in float32."""
    from conftest import TINY

    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(TINY).float().cuda().eval()


@pytest.mark.parametrize(
    "count, speculate", [gpu_case(3, 0), gpu_case(40, 0), gpu_case(3, "auto"), gpu_case(4, 7), gpu_case(20, 3)]
)
def test_many_prompts_are_chat_alone(tiny_on_gpu, chat_tokenizer, count, speculate):
    rows = make_rows(tiny_on_gpu, count, 0.9, speculate)
    alone = {query: tiny_on_gpu.chat(chat_tokenizer, query, do_sample=False)[0] for query in QUERIES}
    prompts = [QUERIES[number * number % len(QUERIES)] for number in range(60)]
    answers = {
        one.index: one.text for one in answer_many(tiny_on_gpu, chat_tokenizer, prompts, temperature=0, rows=rows)
    }
    assert [answers[index] for index in range(len(prompts))] == [alone[prompt] for prompt in prompts]


@pytest.mark.parametrize("precision", [gpu_case("float16"), gpu_case("int8"), gpu_case("int4")])
def test_seeds_do_not_depend_on_the_number_of_rows(tiny_on_gpu, chat_tokenizer, precision):
    import copy

    model = copy.deepcopy(tiny_on_gpu).half()
    if precision != "float16":
        model.quantize(int(precision[3:]))

    def texts(rows):
        found = answer_many(model, chat_tokenizer, QUERIES, seed=3, max_rows=rows, max_tokens=12)
        return [one.text for one in sorted(found, key=lambda one: one.index)]

    # Other sums of the same numbers may choose otherwise now and then.
    assert sum(one != other for one, other in zip(texts(1), texts(6), strict=True)) <= 1


@pytest.mark.parametrize("share", [gpu_case(0.5)])
def test_captured_rows_fit_their_memory(tiny_on_gpu, monkeypatch, share):
    rows = make_rows(tiny_on_gpu, 8, share)
    assert type(rows).__name__ == "CapturedRows" and rows.pages == 8 * 32
    # Each number of rows, greedy and drawn, and the prompts.
    assert len(rows.graphs) >= 2 * 4 + 5
    monkeypatch.setattr(making, "free_bytes", lambda device: making._RESERVED_BYTES)
    with pytest.raises(ValueError, match="Raise --memory"):
        make_rows(tiny_on_gpu, 8, share)
