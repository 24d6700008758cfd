"""Third-party code asks more of a tokenizer than stock answers: special tokens, labels, limits, arguments."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from tokenizer_data import TEXTS, TINY, text_of
from transformers import AutoTokenizer

from faster_chatglm_6b.conversation.detokenizer import IncrementalDetokenizer
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer


def config_with(folder, **changes):
    """Write a tokenizer directory with the changes in its tokenizer_config.json."""
    shutil.copy(TINY / "ice_text.model", folder)
    content = json.loads((TINY / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **changes}))
    return folder


CONTROL = ("<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")


@pytest.mark.parametrize("token", [*CONTROL, "<unk>"])
def test_special_tokens_are_shown_by_their_names(stock, token):
    """lm-evaluation-harness makes a stop string of the end token's text: '' would cut every answer at once."""
    tokenizer, _ = stock
    index = tokenizer.convert_tokens_to_ids(token)
    assert tokenizer.decode([index], skip_special_tokens=False) == token
    assert tokenizer.decode(index, False) == token
    assert tokenizer.batch_decode([[index]], skip_special_tokens=False) == [token]
    assert tokenizer.decode([index]) == tokenizer.decode([index], skip_special_tokens=None)
    assert tokenizer.batch_decode([[index]]) == [tokenizer.decode([index])]


def test_decode_without_the_argument_is_stocks(stock):
    tokenizer, golden = stock
    seen = 0
    for case in golden["cases"]:
        if "decode" in case:
            ids = case["input_ids"]
            expected = case["decode"]["with_special_ids"]
            assert tokenizer.decode(ids) == tokenizer.batch_decode([ids])[0] == expected
            assert tokenizer.batch_decode(torch.tensor([ids, ids])) == [expected, expected]
            assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [case["decode"]["with_special_ids_skip"]]
            seen += 1
    assert seen >= 50


def test_special_tokens_are_shown_in_their_places(tiny):
    prompt, answer = tiny("hello\n\n你好"), tiny.encode("hello world", add_special_tokens=False)
    ids = [tiny.pad_token_id, *prompt["input_ids"], *answer, tiny.eos_token_id]
    shown = tiny.decode(ids, skip_special_tokens=False)
    assert shown == "<pad> hello\n\n你好[gMASK]<sop> hello world<eop>"
    for rows in ([ids, ids], torch.tensor([ids, ids]), np.array([ids, ids])):
        assert tiny.batch_decode(rows, skip_special_tokens=False) == [shown, shown]
    assert tiny.decode(torch.tensor(ids), skip_special_tokens=False) == shown
    assert tiny.decode(ids, skip_special_tokens=True) == tiny.decode(ids) == "hello\n\n你好 hello world"


def test_a_text_without_special_tokens_is_the_same(stock):
    tokenizer, golden = stock
    for case in golden["cases"]:
        ids = case["ids_no_special"]
        if "decode" in case and not any(token in text_of(case) for token in (*CONTROL, "<unk>")):
            unknown = tokenizer.unk_token_id in ids
            assert unknown or tokenizer.decode(ids, skip_special_tokens=False) == case["decode"]["raw"]


def test_special_tokens_beside_added_ones(tiny):
    tiny.add_tokens(["<tool>"])
    ids = [*tiny.encode("hello", add_special_tokens=False), len(tiny) - 1, tiny.eos_token_id]
    assert tiny.decode(ids, skip_special_tokens=False) == "hello <tool> <eop>"
    assert tiny.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "hello<tool><eop>"
    assert tiny.decode(ids) == "hello <tool>"


def test_streaming_stays_as_it_is(tiny):
    ids = [*tiny("你好")["input_ids"], *tiny.encode("hello", add_special_tokens=False), tiny.eos_token_id]
    stream = IncrementalDetokenizer(tiny)
    stream.push(ids)
    assert stream.finish() == tiny.decode(ids) == "你好 hello"


def test_labels_of_minus_100_as_in_stock(stock):
    """The official P-Tuning script prints decoded labels."""
    tokenizer, golden = stock
    negative = next(case for case in golden["decode_cases"] if case["name"] == "negative")
    assert (negative["ids"], negative["text"]) == ([-1], "<image_-1>")
    hello = tokenizer.encode("hello", add_special_tokens=False)
    labels = [-100, -100, *hello, tokenizer.eos_token_id, -100]
    tokens = tokenizer.convert_ids_to_tokens(labels)
    assert tokens[:2] == ["<image_-100>"] * 2 and tokens[-1] == "<image_-100>"
    assert tokenizer.convert_ids_to_tokens(-100) == "<image_-100>" == tokenizer.decode(-100)
    expected = "<image_-100><image_-100> hello<image_-100>"
    assert tokenizer.sp_model.DecodePieces(tokens) == expected  # stock does this
    assert tokenizer.decode(labels) == tokenizer.decode(torch.tensor(labels)) == expected
    assert tokenizer.batch_decode([labels, labels], skip_special_tokens=True) == [expected, expected]
    shown = "<image_-100><image_-100> hello<eop><image_-100>"
    assert tokenizer.decode(labels, skip_special_tokens=False) == shown


@pytest.mark.parametrize("index", [-1, -99, -101, -(2**40)])
def test_other_negative_ids_stay_errors(tiny, index):
    for ask in (tiny.decode, tiny.convert_ids_to_tokens, lambda ids: tiny.batch_decode([ids])):
        with pytest.raises(ValueError, match=f"Token id {index} is not in the vocabulary"):
            ask([5, index])


def test_a_model_that_gives_one_is_an_error_in_streaming(tiny):
    with pytest.raises(ValueError, match="Token id -100 "):
        IncrementalDetokenizer(tiny).push([-100])


def test_longest_sequence_of_the_model(tmp_path):
    assert AutoTokenizer.from_pretrained(TINY, trust_remote_code=True).model_max_length == 2048
    folder = config_with(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(folder).model_max_length == 2048
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_sequence_length": 77}))
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 77 and tokenizer.max_len_single_sentence == 75
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 77


def test_a_longest_sequence_that_is_given_wins(tmp_path):
    folder = config_with(tmp_path, model_max_length=300)
    assert ChatGLMTokenizer.from_pretrained(folder).model_max_length == 300
    assert ChatGLMTokenizer.from_pretrained(folder, model_max_length=40).model_max_length == 40
    assert ChatGLMTokenizer(TINY / "ice_text.model", model_max_length=10**6).model_max_length == 10**6
    # transformers itself saves this number for "not given".
    unlimited = config_with(tmp_path, model_max_length=int(1e30))
    assert ChatGLMTokenizer.from_pretrained(unlimited).model_max_length == 2048


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_end_of_a_prompt(side, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(config_with(tmp_path), model_max_length=20, truncation_side=side)
    text = "hello world " * 50
    plain = tokenizer.encode(text, add_special_tokens=False)
    kept = plain[:18] if side == "right" else plain[-18:]
    end = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert tokenizer(text, truncation=True)["input_ids"] == [*kept, *end]
    assert tokenizer(text)["input_ids"] == [*plain, *end]
    rows = tokenizer([text, "hello"], truncation=True, padding=True)["input_ids"]
    assert rows[0] == [*kept, *end] and rows[1][-2:] == end and len(rows[1]) == 20
    pair = tokenizer(text, text, truncation=True)["input_ids"]
    assert len(pair) == 20 and pair[-1] == tokenizer.eos_token_id and end[0] in pair
    assert len(tokenizer("hello", padding="max_length")["input_ids"]) == 20


def test_truncation_cuts_the_end_of_the_text_as_in_stock(tiny):
    text = "hello world " * 3000
    ids = tiny(text, truncation=True)["input_ids"]
    assert tiny.truncation_side == "right" and len(ids) == 2048
    assert ids == [*tiny.encode(text, add_special_tokens=False)[:2046], tiny.gmask_token_id, tiny.bos_token_id]


@pytest.fixture
def log(monkeypatch):
    """Collect the messages of the tokenizer's log."""
    messages = []
    logger = transformers.utils.logging.get_logger("faster_chatglm_6b.tokenizer.encoding")
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages


def test_offsets_are_refused(tiny):
    calls = [tiny, tiny.encode, lambda *args, **kwargs: tiny(TEXTS, **kwargs)]
    calls += [getattr(tiny, name) for name in ("encode_plus",) if hasattr(tiny, name)]
    for call in calls:
        with pytest.raises(NotImplementedError, match="return_offset"):
            call("hello", return_offsets_mapping=True)
    assert tiny("hello", return_offsets_mapping=False) == tiny("hello")


def test_an_unknown_argument_is_logged(tiny, log):
    assert tiny("hello", max_lenght=3) == tiny("hello")
    tiny.encode("hello", max_lenght=3)
    assert log == ["The tokenizer ignores max_lenght: it has no such argument."] * 2


def test_known_arguments_are_not_logged(tiny, log):
    tiny("hello", split_special_tokens=True, return_length=True, verbose=False, padding_side="left", stride=0)
    tiny(text="hello", text_target="hello", is_split_into_words=False, return_token_type_ids=True)
    assert log == []


def test_special_tokens_mask_has_one_value_per_id(stock):
    """Stock's mask has no value for the tokens that it adds."""
    tokenizer, golden = stock
    for case in golden["batch_cases"]:
        if "special_tokens_mask" in case and "error" not in case:
            encoded = tokenizer(*case["args"], **case["kwargs"])
            ids, mask = np.asarray(encoded["input_ids"]), np.asarray(encoded["special_tokens_mask"])
            special = [*tokenizer.all_special_ids, tokenizer.gmask_token_id]
            assert np.array_equal(mask, np.isin(ids, special).astype(int)), case["name"]
    first, second = tokenizer.encode_text("hello world"), tokenizer.encode_text("你好")
    for sequences in ((first,), (first, second)):
        ids = tokenizer.build_inputs_with_special_tokens(*sequences)
        mask = tokenizer.get_special_tokens_mask(*sequences)
        assert len(mask) == len(ids) and tokenizer.get_special_tokens_mask(ids, None, True) == mask
        types = tokenizer.create_token_type_ids_from_sequences(*sequences)
        assert types == [0] * (len(first) + 2) + [1] * (len(ids) - len(first) - 2)
    with pytest.raises(ValueError, match="second sequence|both sequences"):
        tokenizer.get_special_tokens_mask(first, second, already_has_special_tokens=True)
    padded = tokenizer(TEXTS, padding=True, return_special_tokens_mask=True, return_tensors="pt")
    assert padded["special_tokens_mask"].shape == padded["input_ids"].shape


def test_special_tokens_in_a_text_stay_text_if_asked(tiny):
    split = tiny("[MASK] hello", split_special_tokens=True)["input_ids"]
    assert tiny.mask_token_id not in split and tiny.decode(split) == "[MASK] hello"
    assert tiny.mask_token_id in tiny("[MASK] hello")["input_ids"]


def test_words_and_lengths(tiny):
    whole = tiny("hello world")["input_ids"]
    assert tiny(["hello", "world"], is_split_into_words=True)["input_ids"] == whole
    assert tiny(TEXTS, return_length=True)["length"] == [len(ids) for ids in tiny(TEXTS)["input_ids"]]
    labels = tiny("hello world", text_target="hello")
    assert labels["labels"] == tiny("hello")["input_ids"] and labels["input_ids"] == whole


def test_overflowing_tokens(tiny):
    plain = tiny.encode("hello world this is a test", add_special_tokens=False)
    found = tiny("hello world this is a test", truncation=True, max_length=8, return_overflowing_tokens=True)
    assert found["overflowing_tokens"] == plain[6:] and found["input_ids"][:6] == plain[:6]
