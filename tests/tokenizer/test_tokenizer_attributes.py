"""Third-party code finds the stock tokenizer's attributes and methods, and xgrammar constrains decoding."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizer_data import TINY

from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

IMAGES = 20000


@pytest.fixture(scope="module", params=[0, IMAGES])
def tokenizer(request):
    return ChatGLMTokenizer(TINY / "ice_text.model", num_image_tokens=request.param)


def test_attributes_of_the_stock_tokenizer(tokenizer):
    first = tokenizer.num_image_tokens
    assert first == tokenizer.sp_tokenizer.num_image_tokens == tokenizer.init_kwargs["num_image_tokens"]
    assert Path(tokenizer.vocab_file) == TINY / "ice_text.model" == Path(tokenizer.sp_tokenizer.vocab_file)
    assert isinstance(tokenizer.sp_model, sentencepiece.SentencePieceProcessor)
    assert tokenizer.sp_model is tokenizer.sp_tokenizer.text_tokenizer.sp
    assert tokenizer.gmask_token_id == tokenizer.sp_tokenizer["[gMASK]"] == first + 321
    assert tokenizer.end_token_id == first + 2 and tokenizer.blank_token_id == tokenizer.sp_tokenizer["▁"]
    assert (tokenizer.do_lower_case, tokenizer.remove_space) == (False, False)


def test_sp_tokenizer(tokenizer):
    pieces, first = tokenizer.sp_tokenizer, tokenizer.num_image_tokens
    assert (pieces.num_text_tokens, pieces.num_tokens) == (664, first + 664)
    assert pieces.max_blank_length == 80 and pieces.byte_fallback
    assert [tokenizer.convert_tokens_to_ids(token) - first for token in pieces.special_tokens] == list(range(320, 328))
    assert pieces.get_blank_token(7) == "<|blank_7|>" in pieces and pieces.get_tab_token() == "<|tab|>" in pieces
    assert pieces.postprocess("a<n><|tab|><|blank_3|>b") == "a\n\t   b"
    assert pieces["<image_12>"] == 12 and pieces[first + 157] == "▁hello" and pieces["▁hello"] == first + 157
    assert pieces.decode(pieces.encode("hello\n  world")) == "hello\n  world"
    assert pieces.decode_tokens(pieces.tokenize("hello\n  world")) == "hello\n  world"


def test_text_tokenizer(tokenizer):
    """The bare model counts its ids from 0 in every vocabulary."""
    model = tokenizer.sp_tokenizer.text_tokenizer
    ids = model.encode("hello world")
    assert ids == [157, 156] and model.decode(ids) == "hello world"
    assert model.tokenize("hello world") == ["▁hello", "▁world"] == [model.convert_id_to_token(index) for index in ids]
    assert model.convert_tokens_to_ids(["▁hello", "▁world"]) == ids and model.convert_token_to_id("▁hello") == 157
    assert model.convert_tokens_to_string(["▁hello", "▁world"]) == "hello world"
    assert len(model) == model.num_tokens == 664


def test_bytes_of_ids_are_what_decoding_gives(tokenizer):
    texts = tokenizer.sp_tokenizer.bytes_of_ids()
    assert len(texts) == tokenizer.vocab_size
    for text in ('hello\n\n  world\t你好 🙂 {"a": 1}', "[gMASK]<sop>", "x" + " " * 100 + "y"):
        ids = tokenizer.encode_text(text)
        assert b"".join(texts[index] for index in ids) == b" " + tokenizer.decode(ids).encode()
    for token in ("<unk>", "<pad>", "<sop>", "<eop>", "[gMASK]", "</s>"):
        assert texts[tokenizer.convert_tokens_to_ids(token)] == b""
    assert not any(texts[: tokenizer.num_image_tokens])


@pytest.fixture(scope="module")
def xgrammar():
    """Return xgrammar, which is no dependency but part of the clients' environment."""
    return pytest.importorskip("xgrammar", reason="xgrammar is not installed")


def test_xgrammar_from_huggingface(xgrammar, tokenizer):
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=tokenizer.vocab_size + 40)
    assert info.vocab_type == xgrammar.VocabType.BYTE_FALLBACK and info.add_prefix_space
    assert info.stop_token_ids == [tokenizer.eos_token_id] and info.vocab_size == tokenizer.vocab_size + 40
    decoded, expected = info.decoded_vocab, tokenizer.sp_tokenizer.bytes_of_ids()
    markers = [*tokenizer.sp_tokenizer.control_pieces.values(), "<n>", "<|tab|>"]
    markers += [f"<|blank_{length}|>" for length in range(2, 81)]
    literal = {tokenizer.convert_tokens_to_ids(marker) for marker in markers}
    for index in range(tokenizer.num_image_tokens, tokenizer.vocab_size):
        # xgrammar takes markers and control pieces as the text of their names; the next test shows what does not.
        name = tokenizer.convert_ids_to_tokens(index)
        assert decoded[index] == (name.encode() if index in literal else expected[index]), name


def test_xgrammar_with_bytes_of_ids_gives_json(xgrammar, tiny_model, tiny_tokenizer):
    info = xgrammar.TokenizerInfo(
        tiny_tokenizer.sp_tokenizer.bytes_of_ids(),
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=tiny_model.config.vocab_size,
        stop_token_ids=[tiny_tokenizer.eos_token_id],
        add_prefix_space=True,
    )
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    compiler = xgrammar.GrammarCompiler(info)
    grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
    bitmask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    matcher = xgrammar.GrammarMatcher(grammar)
    assert all(matcher.accept_token(index) for index in tiny_tokenizer.convert_tokens_to_ids(["{", '"']))
    matcher.fill_next_token_bitmask(bitmask)
    allowed = [index for index in range(664) if bitmask[0, index // 32] >> (index % 32) & 1]
    names = tiny_tokenizer.convert_ids_to_tokens(allowed)
    assert "n" in names and not {"<n>", "<|tab|>", "[gMASK]", "<eop>"} & set(names)
    processor = xgrammar.contrib.hf.LogitsProcessor(grammar)
    prompt = tiny_tokenizer("你好", return_tensors="pt")["input_ids"]
    output = tiny_model.generate(prompt, max_new_tokens=80, do_sample=False, logits_processor=[processor])
    answer = json.loads(tiny_tokenizer.decode(output[0, prompt.shape[1] :].tolist()))
    assert set(answer) == {"name", "count"} and type(answer["count"]) is int
