"""``chat``, ``stream_chat`` and ``stream_generate`` agree with stock, except for stock's bugs, tested below."""

import pytest
import torch
from transformers import LogitsProcessorList

from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor
from faster_chatglm_6b.templates.prompts import build_prompt, process_response

# Stock misbehaves in these cases; each has a test of its own below.
STOCK_BUGS = {
    "mask_in_query",
    "eop_in_query",
    "sop_in_query",
    "empty_query",
    "prompt_longer_than_max_length",
    "prompt_equal_max_length",
    "no_repeat_ngram_size (InvalidScoreLogitsProcessor trap)",
    "min_length (trap)",
    "beam3",
    "beam3_h1",
}


@pytest.fixture(scope="module")
def golden_chat(golden_json):
    return golden_json("chat")


@pytest.fixture(scope="module")
def cases(golden_chat):
    return {case["name"]: case for case in golden_chat["cases"]}


def rounds(history):
    return [tuple(pair) for pair in history]


def test_chat_equals_stock(tiny_model, tiny_tokenizer, cases):
    checked = 0
    for name, case in cases.items():
        if name in STOCK_BUGS:
            continue
        history = case["history"]
        assert build_prompt(case["query"], history or []) == case["prompt"], name
        response, new_history = tiny_model.chat(tiny_tokenizer, case["query"], history=history, **case["kwargs"])
        assert response == case["response"], name
        assert rounds(new_history) == rounds(case["new_history"]), name
        checked += 1
    assert checked > 20


def test_stream_chat_equals_stock_and_yields_the_last_token(tiny_model, tiny_tokenizer, cases):
    """Stock never yields the token at which ``max_length`` stops it."""
    longer_than_stock = 0
    for name, case in cases.items():
        if name in STOCK_BUGS or not case["stream_responses"]:
            continue
        chunks = list(tiny_model.stream_chat(tiny_tokenizer, case["query"], history=case["history"], **case["kwargs"]))
        responses, stock = [response for response, _ in chunks], case["stream_responses"]
        assert responses[: len(stock)] == stock, name
        assert responses[-1] == case["response"], name
        assert rounds(chunks[-1][1]) == rounds(case["new_history"]), name
        longer_than_stock += not case["stream_final_equals_chat"]
    assert longer_than_stock > 5


def test_stream_chat_of_an_immediate_end_keeps_the_round(tiny_model, tiny_tokenizer, cases):
    """Stock yields nothing in this case and loses the history."""
    case = cases["h0|再见"]
    assert case["stream_responses"] == [] and case["response"] == ""
    chunks = list(tiny_model.stream_chat(tiny_tokenizer, case["query"], **case["kwargs"]))
    assert chunks == [("", [(case["query"], "")])]


def test_control_tokens_in_user_text_stay_text(tiny_model, tiny_tokenizer, cases):
    """Stock turns them into control ids, which move the context's end or cut the text."""
    config = tiny_model.config
    control = {
        config.mask_token_id,
        config.gmask_token_id,
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    }
    for name in ("mask_in_query", "eop_in_query", "sop_in_query"):
        case = cases[name]
        assert len(control & set(case["prompt_ids"][:-2])) == 1
        ids = tiny_model._chat_input_ids(tiny_tokenizer, case["query"], [])[0].tolist()
        assert not control & set(ids[:-2]) and ids[-2:] == [config.gmask_token_id, config.bos_token_id]
        response, _ = tiny_model.chat(tiny_tokenizer, case["query"], do_sample=False, max_new_tokens=8)
        assert isinstance(response, str)
    everything = "[gMASK] [MASK] <sop> <eop> <pad> <unk> </s>"
    assert not control & set(tiny_tokenizer.encode_text(everything))
    ids = tiny_model._chat_input_ids(tiny_tokenizer, "hi", [(everything, everything)])[0].tolist()
    assert not control & set(ids[:-2])


def test_minus_infinity_is_no_overflow(tiny_model, tiny_tokenizer, cases):
    """Stock forces token 5 if another processor forbids a token."""
    for name in ("no_repeat_ngram_size (InvalidScoreLogitsProcessor trap)", "min_length (trap)"):
        case = cases[name]
        assert len(case["output_ids"]) == case["kwargs"]["max_length"]
        response, _ = tiny_model.chat(tiny_tokenizer, case["query"], history=case["history"], **case["kwargs"])
        assert response != case["response"], name
        input_ids = torch.tensor([case["prompt_ids"]])
        plain = tiny_model.generate(input_ids, **case["kwargs"])[0, input_ids.shape[1] :].tolist()
        assert response == process_response(tiny_tokenizer.decode(plain)), name


def test_invalid_scores_are_replaced_row_by_row(golden_chat):
    """Stock resets the whole batch for one bad row, and takes -inf for a bad value."""
    stock = golden_chat["invalid_score_processor"]
    processor = InvalidScoreLogitsProcessor()
    good = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    certain = torch.tensor(stock["nan"][0])
    for bad in (torch.nan, torch.inf):
        row = good.clone()
        row[2] = bad
        assert torch.equal(processor(None, torch.stack((row, good))), torch.stack((certain, good)))
    assert stock["one_bad_row_resets_whole_batch"] == [certain.tolist()] * 2
    forbidden = good.clone()[None]
    forbidden[0, 2] = -torch.inf
    assert torch.equal(processor(None, forbidden), forbidden) and stock["-inf"] == [certain.tolist()]
    assert processor(None, good[None]).tolist() == stock["ok"]


def test_the_callers_processor_list_does_not_grow(tiny_model, tiny_tokenizer, golden_chat):
    assert golden_chat["user_logits_processor_list_grows"] == ["InvalidScoreLogitsProcessor"] * 2
    processors = LogitsProcessorList()
    for _ in range(2):
        tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=2, logits_processor=processors)
    assert len(processors) == 0


def test_history_is_not_changed(tiny_model, tiny_tokenizer):
    history = [("你好", "好")]
    _, new_history = tiny_model.chat(tiny_tokenizer, "测试", history=history, do_sample=False, max_new_tokens=3)
    assert history == [("你好", "好")] and new_history[0] == history[0] and len(new_history) == 2


@pytest.mark.parametrize("name", ["prompt_longer_than_max_length", "prompt_equal_max_length"])
def test_a_prompt_that_leaves_no_room_is_refused(tiny_model, tiny_tokenizer, cases, name):
    """Stock's ``chat`` returns one token, and its stream returns nothing."""
    case = cases[name]
    assert case["stream_responses"] == []
    for call in (tiny_model.chat, tiny_model.stream_chat):
        with pytest.raises(ValueError, match="leaves no room for an answer"):
            call(tiny_tokenizer, case["query"], **case["kwargs"])


def test_beams_in_chat(tiny_model, tiny_tokenizer, cases):
    for name in ("beam3", "beam3_h1"):
        case = cases[name]
        response, _ = tiny_model.chat(tiny_tokenizer, case["query"], history=case["history"], **case["kwargs"])
        ids = torch.tensor([case["prompt_ids"]])
        output = tiny_model.generate(ids, **case["kwargs"])[0, ids.shape[1] :].tolist()
        assert response == process_response(tiny_tokenizer.decode(output)), name


def test_stream_generate_fills_ended_rows_with_pads(tiny_model, tiny_tokenizer, golden_chat):
    """Stock goes on after <eop>, and leaves the last token out."""
    stock, expected = golden_chat["stream_generate_batch"], golden_chat["generate_batch_same"]
    inputs = tiny_tokenizer(stock["texts"], return_tensors="pt", padding=True)
    steps = list(tiny_model.stream_generate(**inputs, do_sample=False, max_length=len(expected[0])))
    assert len(steps) == stock["n_yields"] + 1
    assert [step.shape[1] for step in steps] == list(range(inputs["input_ids"].shape[1] + 1, len(expected[0]) + 1))
    assert steps[-1].tolist() == expected
    assert stock["last"][1][-1] != 3 and steps[-1][1, -1] == 3


def test_process_response(golden_chat):
    assert len(golden_chat["process_response"]) > 50
    for text, expected in golden_chat["process_response"]:
        assert process_response(text) == expected, text


def test_seeded_sampling_is_repeatable_and_streams_the_same(tiny_model, tiny_tokenizer):
    answers = []
    for _ in range(2):
        torch.manual_seed(7)
        answers.append(tiny_model.chat(tiny_tokenizer, "你好", max_length=24)[0])
    torch.manual_seed(7)
    streamed = list(tiny_model.stream_chat(tiny_tokenizer, "你好", max_length=24))[-1][0]
    assert answers[0] == answers[1] == streamed
    torch.manual_seed(8)
    assert tiny_model.chat(tiny_tokenizer, "你好", max_length=24)[0] != answers[0]


def test_streams_leave_autograd_alone(tiny_model, tiny_tokenizer):
    for _ in tiny_model.stream_chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=3):
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        inside = tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=3)
    assert inside == tiny_model.chat(tiny_tokenizer, "你好", do_sample=False, max_new_tokens=3)
