"""Checkpoints with the vocabulary of 150528 ids have 20000 ids of images before those of the text.

No original is at hand. Today's tiny checkpoint gets 20000 rows before its embedding and shifted ids in config.json.
It must give every text that it gives without them.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_data import TEXTS, TINY, load_golden, load_tokenizer, real_tokenizer_folder, text_of
from transformers import AutoModel, AutoTokenizer

from faster_chatglm_6b.configuration_chatglm import ChatGLMConfig
from faster_chatglm_6b.conversation.detokenizer import IncrementalDetokenizer
from faster_chatglm_6b.generation.processors import InvalidScoreLogitsProcessor
from faster_chatglm_6b.generation.requests import plan_sampling
from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from faster_chatglm_6b.tokenizer import vocabulary_file
from faster_chatglm_6b.tokenizer.ice_text import IceTextTokenizer

IMAGES = 20000
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id")
# What the files say; None removes the key. As published in March 2023, with a later file, and said explicitly.
MARCH = {"eos_token": "</s>", "eop_token": "<eop>", "end_token": None, "num_image_tokens": None}
STATES = {"march": MARCH, "no number": {"num_image_tokens": None}, "explicit": {"num_image_tokens": IMAGES}}


def edited(path: Path, changes: dict) -> dict:
    """Return the content of a JSON file with the changes; None removes a key."""
    content = {**json.loads(path.read_text("utf-8")), **changes}
    return {key: value for key, value in content.items() if value is not None}


def old_checkpoint(folder: Path, state: dict) -> Path:
    """Write the tiny checkpoint with the old vocabulary; its config.json names no [MASK] and no [gMASK], as then."""
    folder.mkdir()
    weights = load_file(TINY / "model.safetensors")
    for name in {"transformer.word_embeddings.weight", "lm_head.weight"} & set(weights):
        rows = weights[name]
        images = torch.full((IMAGES, rows.shape[1]), 0.001, dtype=rows.dtype)
        weights[name] = torch.cat([images, rows])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    shifted = {name: config[name] + IMAGES for name in ("vocab_size", *IDS)}
    shifted |= {"mask_token_id": None, "gmask_token_id": None}
    (folder / "config.json").write_text(json.dumps(edited(TINY / "config.json", shifted)))
    (folder / "tokenizer_config.json").write_text(json.dumps(edited(TINY / "tokenizer_config.json", state)))
    shutil.copyfile(TINY / "ice_text.model", folder / "ice_text.model")
    return folder


@pytest.fixture(scope="module")
def old_dir(tmp_path_factory):
    return old_checkpoint(tmp_path_factory.mktemp("old") / "march", MARCH)


@pytest.fixture(scope="module")
def old_model(old_dir):
    return AutoModel.from_pretrained(old_dir, trust_remote_code=True).float().eval()


@pytest.fixture(scope="module")
def old_tokenizer(old_dir):
    return AutoTokenizer.from_pretrained(old_dir, trust_remote_code=True)


@pytest.fixture(scope="module", params=["tiny", "real"])
def stock(request):
    """Return our tokenizer with 20000 image tokens, and what stock gave without any."""
    folder = TINY if request.param == "tiny" else real_tokenizer_folder()
    return ChatGLMTokenizer(folder / "ice_text.model", num_image_tokens=IMAGES), load_golden(request.param)


def shifted(ids):
    return [shifted(row) if isinstance(row, list) else row + IMAGES for row in ids]


def answers(cases):
    """Return the greedy cases of chat in which stock is right."""
    return [case for case in cases if case["name"].startswith(("h0|", "h1|", "h2|")) and case["kwargs"]]


def test_every_golden_text_with_shifted_ids(stock):
    tokenizer, golden = stock
    for case in golden["cases"]:
        text, ids = text_of(case), shifted(case["input_ids"])
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.encode(text, add_special_tokens=False) == shifted(case["ids_no_special"]), text
        if "tokens" in case:
            assert tokenizer.tokenize(text) == case["tokens"], text
            assert tokenizer.convert_tokens_to_ids(case["tokens"]) == shifted(case["ids_no_special"]), text
            assert tokenizer.convert_ids_to_tokens(shifted(case["ids_no_special"])) == case["tokens"], text
        if "decode" in case:
            assert tokenizer.decode(ids) == case["decode"]["with_special_ids"], text
            assert tokenizer.decode(ids, skip_special_tokens=True) == case["decode"]["with_special_ids_skip"], text
            stream = IncrementalDetokenizer(tokenizer)
            for index in ids:
                stream.push([index])
            assert stream.finish() == case["decode"]["with_special_ids"], text
    assert tokenizer.vocab_size == golden["attributes"]["vocab_size"] + IMAGES == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id", "gmask_token_id"):
        assert getattr(tokenizer, name) == golden["attributes"][name] + IMAGES, name


def test_padding(stock):
    tokenizer, golden = stock
    for case in golden["cases"]:
        expected = case["padded_single"]
        padded = tokenizer([text_of(case)], padding=True, return_tensors="np")
        assert list(padded["attention_mask"].shape) == expected["attention_mask_shape"]
        if "attention_mask_rows" in expected:
            rows = ["".join(str(int(hidden)) for hidden in row) for row in padded["attention_mask"][0][0]]
            assert rows == expected["attention_mask_rows"], case["text"]
    batch = tokenizer(TEXTS, padding=True)["input_ids"]
    assert {row[0] for row in batch} - {tokenizer.pad_token_id} and len({len(row) for row in batch}) == 1


def test_image_tokens_by_their_names_as_in_stock(stock):
    tokenizer, _ = stock
    assert tokenizer.decode([5]) == "<image_5>" == tokenizer.decode(5)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    tokens = ["<image_7>", *tokenizer.convert_ids_to_tokens(hello), "<image_19999>"]
    assert tokenizer.convert_ids_to_tokens([7, *hello, 19999]) == tokens
    assert tokenizer.convert_tokens_to_ids(tokens) == [7, *hello, 19999]
    assert tokenizer.decode([7, *hello, 19999]) == tokenizer.sp_model.DecodePieces(tokens)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<image_0>"] == 0 and vocabulary["<unk>"] == IMAGES and len(vocabulary) == len(tokenizer)
    stream = IncrementalDetokenizer(tokenizer)
    for index in [*hello, 7, *hello]:
        shown = stream.push([index])
    assert shown == stream.finish() == tokenizer.decode([*hello, 7, *hello])


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_the_number_of_image_tokens_is_found(state, tmp_path):
    folder = old_checkpoint(tmp_path / "old", state)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(tokenizer) is ChatGLMTokenizer and tokenizer.num_image_tokens == IMAGES
    assert tokenizer("你好")["input_ids"] == shifted([5, 143, 321, 324])
    assert tokenizer("你好", "你好")["input_ids"] == shifted([5, 143, 321, 324, 5, 143, 325])
    assert (tokenizer.eos_token, tokenizer.end_token, tokenizer.eop_token) == ("<eop>", "</s>", "<eop>")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "saved")  # the saved folder has no config.json
    assert again("你好", "你好") == tokenizer("你好", "你好") and again.get_vocab() == tokenizer.get_vocab()


def test_without_a_config_or_beside_one_of_today_there_are_none(tmp_path):
    shutil.copy(TINY / "ice_text.model", tmp_path)
    config = edited(TINY / "tokenizer_config.json", {"num_image_tokens": None})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for beside in (None, "{}", "[", (TINY / "config.json").read_text("utf-8")):
        if beside is not None:
            (tmp_path / "config.json").write_text(beside)
        assert ChatGLMTokenizer.from_pretrained(tmp_path)("你好")["input_ids"] == [5, 143, 321, 324]


def first_file(content: bytes) -> bytes:
    """Return ice_text.model as it was before it got the control, blank and byte pieces."""
    byte_fallback = b"\x98\x02\x01"
    kept, at = [], 0
    while at < len(content):
        start, number = at, content[at] >> 3
        length, at = read_number(content, at + 1)
        body, at = content[at : at + length], at + length
        if number == 1:
            kept.append(content[start:at])
        elif number == 2:
            body = body.replace(byte_fallback, b"")
            assert len(body) < 128
            kept[-344:] = [b"\x12" + bytes([len(body)]) + body]
        else:
            kept.append(content[start:at])
    return b"".join(kept)


def read_number(content: bytes, at: int) -> tuple[int, int]:
    """Return a protobuf varint, and where it ends."""
    number = shift = 0
    while True:
        number |= (content[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 128:
            return number, at


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_the_first_ice_text_model_becomes_the_current_one(which, tmp_path, monkeypatch):
    current = (TINY if which == "tiny" else real_tokenizer_folder()) / "ice_text.model"
    path = tmp_path / "ice_text.model"
    path.write_bytes(first_file(current.read_bytes()))
    expected = IceTextTokenizer(current)
    monkeypatch.setattr(vocabulary_file, "_TEXT_PIECES", expected.num_text_tokens - 344)
    pieces = IceTextTokenizer(path)
    assert pieces.is_first_file and not expected.is_first_file
    assert pieces.pieces == expected.pieces and pieces.control_pieces == expected.control_pieces
    for case in load_golden(which)["cases"]:
        assert pieces.encode(text_of(case)) == expected.encode(text_of(case))
    tokenizer = ChatGLMTokenizer(path)
    assert tokenizer.num_image_tokens == IMAGES, "without any config, this file goes with image tokens"
    assert tokenizer("你好")["input_ids"] == shifted(load_tokenizer(which)("你好")["input_ids"])
    assert ChatGLMTokenizer(path, num_image_tokens=0)("你好") == load_tokenizer(which)("你好")
    tokenizer.save_pretrained(tmp_path / "saved")
    monkeypatch.undo()
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "saved")
    assert not again.sp_tokenizer.is_first_file and again.get_vocab() == tokenizer.get_vocab()


def test_the_first_ice_text_model_is_the_published_one():
    """Size and hash are those of March 2023's file as remembered: no copy of it was at hand."""
    content = first_file((real_tokenizer_folder() / "ice_text.model").read_bytes())
    assert len(content) == 2699926
    assert hashlib.sha256(content).hexdigest() == "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"


FIRST_NUMBERS = {"bos_token_id": 150004, "eos_token_id": 150005, "vocab_size": 150528}


def test_ids_that_config_json_leaves_out():
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "inner_hidden_size": 8}
    config = ChatGLMConfig.from_dict({**FIRST_NUMBERS, **sizes, "max_sequence_length": 2048})
    assert (config.mask_token_id, config.gmask_token_id, config.pad_token_id) == (150000, 150001, 20003)
    config = ChatGLMConfig.from_dict({**FIRST_NUMBERS, **sizes, "max_sequence_length": 2048, "gmask_token_id": 7})
    assert config.gmask_token_id == 7


@pytest.mark.parametrize("eos", [None, 150004, "150005"])
def test_ids_are_not_guessed_from_ids_that_do_not_fit(eos):
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "inner_hidden_size": 8}
    content = {**FIRST_NUMBERS, **sizes, "max_sequence_length": 2048, "eos_token_id": eos}
    with pytest.raises(ValueError, match=r"lacks .*mask_token_id, gmask_token_id"):
        ChatGLMConfig.from_dict(content)


def test_chat_and_stream_chat_of_the_old_vocabulary(old_model, old_tokenizer, golden_json):
    cases = answers(golden_json("chat")["cases"])
    for case in cases:
        arguments = (old_tokenizer, case["query"], case["history"])
        response, history = old_model.chat(*arguments, **case["kwargs"])
        assert response == case["response"], case["name"]
        *_, (streamed, _) = old_model.stream_chat(*arguments, **case["kwargs"])
        assert streamed == response, case["name"]
    assert len(cases) > 5


def test_chat_batch(old_model, old_tokenizer, golden_json):
    cases = [case for case in answers(golden_json("chat")["cases"]) if case["name"].startswith("h0|")][:4]
    settings = {"max_length": 48, "do_sample": False}
    assert all(case["kwargs"] == settings for case in cases)
    responses, _ = old_model.chat_batch(old_tokenizer, [case["query"] for case in cases], **settings)
    assert responses == [case["response"] for case in cases]


def test_generate(old_model, golden_json):
    cases = [case for case in golden_json("generate")["cases"] if case["name"].startswith(("greedy|", "batch_greedy"))]
    for case in cases:
        prompt = torch.tensor(shifted(case["prompt_ids"]))
        mask = (prompt != 3 + IMAGES).long()
        output = old_model.generate(prompt, attention_mask=mask, **case["kwargs"])
        assert output.tolist() == shifted(case["output_ids"]), case["name"]
    assert cases


def test_save_and_reload(old_model, old_tokenizer, tmp_path):
    old_model.save_pretrained(tmp_path)
    old_tokenizer.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    settings = {"max_length": 40, "do_sample": False}
    assert model.chat(tokenizer, "night", **settings) == old_model.chat(old_tokenizer, "night", **settings)
    assert model.config.gmask_token_id == 20321 and tokenizer.num_image_tokens == IMAGES


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(bits, old_dir, old_tokenizer, tiny_dir, tiny_tokenizer, tmp_path):
    settings = {"max_length": 40, "do_sample": False}
    today = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True).float().eval().quantize(bits)
    expected, _ = today.chat(tiny_tokenizer, "你好", **settings)
    model = AutoModel.from_pretrained(old_dir, trust_remote_code=True).float().eval().quantize(bits)
    assert model.chat(old_tokenizer, "你好", **settings)[0] == expected
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).float().eval()
    assert again.config.quantization_bit == bits and again.chat(old_tokenizer, "你好", **settings)[0] == expected


def test_rows_with_invalid_scores_say_the_blank_of_this_vocabulary(old_model, old_tokenizer, monkeypatch):
    seen = []
    # The plain path calls the processor.
    monkeypatch.setenv("FASTER_CHATGLM_6B_KERNELS", "off")
    monkeypatch.setattr(
        InvalidScoreLogitsProcessor, "__call__", lambda self, ids, scores: seen.append(self.token_id) or scores
    )
    old_model.chat(old_tokenizer, "你好", max_length=6, do_sample=False)
    plans = [plan_sampling([InvalidScoreLogitsProcessor(token)], False, None, 20704) for token in (IMAGES + 5, 5)]
    assert [plan.invalid_token for plan in plans] == [IMAGES + 5, 5] and plans[0].graph_key != plans[1].graph_key
    assert set(seen) == {IMAGES + 5} and old_tokenizer.convert_ids_to_tokens(IMAGES + 5) == "▁"


def test_a_tokenizer_of_the_other_vocabulary_is_refused(old_model, tiny_model, old_tokenizer, tiny_tokenizer):
    for model, tokenizer in ((old_model, tiny_tokenizer), (tiny_model, old_tokenizer)):
        with pytest.raises(ValueError, match="load both from the same checkpoint"):
            model.chat(tokenizer, "你好")


def test_logits_are_those_without_the_images(old_model, tiny_model):
    ids = torch.tensor([[5, 143, 321, 324]])
    with torch.no_grad():
        old, today = old_model(ids + IMAGES).logits[..., IMAGES:], tiny_model(ids).logits
    assert np.array_equal(old.numpy(), today.numpy()) or torch.allclose(old, today, atol=1e-5)
