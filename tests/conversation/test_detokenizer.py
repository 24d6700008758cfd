"""IncrementalDetokenizer gives the text of ``tokenizer.decode`` at every step, without half characters."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_profiles import examples
from tokenizer_data import load_tokenizer, text_of

from faster_chatglm_6b.conversation import detokenizer
from faster_chatglm_6b.conversation.detokenizer import IncrementalDetokenizer

HALF = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def byte_ids(tokenizer, content: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in content])


def unfinished(tokenizer, ids: list[int]) -> int:
    """Count the ids at the end that may become a character: add bytes until ``decode`` shows no U+FFFD there."""
    ids = tokenizer.decodable_ids(ids)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    run = bytearray()
    for piece in reversed(pieces[-3:]):
        if not (piece.startswith("<0x") and len(piece) == 6):
            break
        run.insert(0, int(piece[3:5], 16))
    for length in (3, 2, 1):
        tail = bytes(run[-length:])
        if len(tail) == length and tail[0] >= 0xC0 and any(_is_utf8(tail + rest) for rest in _ENDINGS):
            return length
    return 0


# Following bytes at the edges of their ranges, for characters of two to four bytes.
_EDGES = (b"\x80", b"\x8f", b"\x90", b"\x9f", b"\xa0", b"\xbf")
_ENDINGS = [first + rest for first in _EDGES for rest in (b"", b"\x80", b"\x80\x80")]


def _is_utf8(content: bytes) -> bool:
    try:
        return len(content.decode()) == 1
    except UnicodeDecodeError:
        return False


def check(tokenizer, ids: list[int], cuts: list[int] | None = None) -> None:
    """Push ``ids`` one by one, or cut at ``cuts``, and compare each text with ``tokenizer.decode``."""
    stream = IncrementalDetokenizer(tokenizer)
    taken = 0
    for end in cuts or range(1, len(ids) + 1):
        text = stream.push(ids[taken:end])
        taken = end
        held_back = unfinished(tokenizer, ids[:end])
        decodable = tokenizer.decodable_ids(ids[:end])
        assert text == tokenizer.decode(decodable[: len(decodable) - held_back]), (ids[:end], held_back)
        if max(decodable, default=0) < tokenizer.vocab_size:  # blanks go between added tokens and what follows them
            assert text + HALF * held_back == tokenizer.decode(ids[:end]), (ids[:end], held_back)
        assert stream.finish() == tokenizer.decode(ids[:end])
    assert stream.push([]) == stream.push([])
    assert stream.finish() == tokenizer.decode(ids)


def test_every_golden_text(stock):
    tokenizer, golden = stock
    for case in golden["cases"]:
        ids = case["input_ids"]
        if len(ids) > 400:
            check(tokenizer, ids, cuts=list(range(37, len(ids) + 37, 37)))
        else:
            check(tokenizer, ids)
            assert HALF not in text_of(case)
            stream = IncrementalDetokenizer(tokenizer)
            assert not any(HALF in stream.push([index]) for index in ids), case["text"]


def test_golden_decode_cases(stock):
    tokenizer, golden = stock
    for case in golden["decode_cases"]:
        ids = case["ids"] if isinstance(case["ids"], list) else [case["ids"]]
        if case["name"] == "negative":
            with pytest.raises(ValueError, match="Token id -1 "):
                IncrementalDetokenizer(tokenizer).push(ids)
        elif not case["kwargs"] and isinstance(case["text"], str):
            check(tokenizer, ids)
            stream = IncrementalDetokenizer(tokenizer)
            stream.push(ids)
            assert stream.finish() == case["text"]


def interesting_ids(tokenizer) -> list[list[int]]:
    """Return groups of ids that are hard to put together: each is drawn from with the same chance."""
    vocabulary = tokenizer.get_vocab()
    rule_pieces = [
        ".",
        ",",
        "!",
        "?",
        "'",
        "▁",
        "▁'",
        "n",
        "t",
        "s",
        "m",
        "v",
        "e",
        "r",
        "'s",
        "▁n",
        "<",
        ">",
        "|",
        "_",
    ]
    return [
        list(range(tokenizer.vocab_size + 3)),
        byte_ids(tokenizer, bytes(range(256))),
        byte_ids(tokenizer, "é你😀�".encode()),
        byte_ids(tokenizer, b"\xe0\xa0\xed\x9f\xf0\x90\xf4\x8f\xc0\xf5\x80\xbf"),
        byte_ids(tokenizer, b" .,'nt<|tab>"),
        [vocabulary[token] for token in ("<pad>", "<sop>", "<eop>", "[gMASK]", "[MASK]", "<unk>", "</s>")],
        [vocabulary[token] for token in ("<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "▁")],
        [vocabulary[token] for token in rule_pieces if token in vocabulary],
    ]


def test_random_ids(stock):
    tokenizer, _ = stock
    groups = interesting_ids(tokenizer)
    draw = random.Random(0)
    for _ in range(400):
        chosen = draw.sample(groups, draw.randint(1, len(groups)))
        ids = [draw.choice(draw.choice(chosen)) for _ in range(draw.randint(1, 40))]
        check(tokenizer, ids)
        cuts = sorted({draw.randint(1, len(ids)) for _ in range(4)} | {len(ids)})
        check(tokenizer, ids, cuts)


@examples(short=200, long=20_000)
@given(text=st.text(st.sampled_from(" .,?!'ntmsver<|>bla_k280你é😀\n\t"), max_size=40))
def test_texts_full_of_markers_and_spacing(tiny, text):
    check(tiny, tiny.encode_text(text))


@examples(short=200, long=20_000)
@given(content=st.binary(max_size=24))
def test_any_bytes(tiny, content):
    check(tiny, byte_ids(tiny, content))


@pytest.mark.parametrize("character", ["é", "你", "😀", "\N{REPLACEMENT CHARACTER}"])
def test_a_character_of_several_bytes_shows_when_it_is_whole(stock, character):
    tokenizer, _ = stock
    hello = tokenizer.encode_text("hello")
    for before in ([], hello):
        stream = IncrementalDetokenizer(tokenizer)
        shown = stream.push(before)
        *first, last = byte_ids(tokenizer, character.encode())
        for index in first:
            assert stream.push([index]) == shown
        assert stream.push([last]) == shown + character


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"\xf0\x9f\x98a", ["", "", "", HALF * 3 + "a"]),
        (b"\xe4\xbd\xe4\xbd\xa0", ["", "", HALF * 2, HALF * 2, HALF * 2 + "你"]),
        (b"\xff\xc0\xf5", [HALF, HALF * 2, HALF * 3]),  # no character starts like this
        (b"\x80\xbf", [HALF, HALF * 2]),
        (b"\xe0\x80", ["", HALF * 2]),  # overlong
        (b"\xed\xa0", ["", HALF * 2]),  # a surrogate
        (b"\xf4\x90", ["", HALF * 2]),  # beyond U+10FFFF
    ],
)
def test_invalid_bytes_show_once_that_is_certain(tiny, content, texts):
    stream = IncrementalDetokenizer(tiny)
    assert [stream.push([index]) for index in byte_ids(tiny, content)] == texts
    assert stream.finish() == texts[-1]


def test_an_unfinished_character_ends_as_replacement_characters(tiny):
    ids = [*tiny.encode_text("hello"), *byte_ids(tiny, b"\xf0\x9f\x98")]
    stream = IncrementalDetokenizer(tiny)
    assert stream.push(ids) == "hello"
    assert stream.finish() == "hello" + HALF * 3 == tiny.decode(ids)
    assert stream.push(byte_ids(tiny, b"\x80")) == "hello😀"  # finish() only looks


def test_control_tokens_and_pads_between_bytes(tiny):
    first, second, third = byte_ids(tiny, "你".encode())
    stream = IncrementalDetokenizer(tiny)
    assert stream.push([first, tiny.pad_token_id, second]) == ""  # decode drops pads before it looks at bytes
    assert stream.push([tiny.pad_token_id, third]) == "你"
    assert stream.push([first, tiny.eos_token_id, second, third]) == "你" + HALF * 3


def test_later_text_changes_spacing_and_markers_as_decode_does(tiny):
    stream = IncrementalDetokenizer(tiny)
    vocabulary = tiny.get_vocab()
    assert [stream.push([vocabulary[piece]]) for piece in ("▁a", "▁", ",", "<0x3C>", "n", ">")] == [
        *("a", "a ", "a,", "a,<", "a,<n", "a,\n"),
    ]


def test_markers_spelled_out_in_single_characters(tiny):
    for text in ("<n>", "<|tab|>", "<|blank_2|>", "a<|blank_80|>", "<|blank_81|>", "<<|tab|><n", "<|blank_80<n>"):
        check(tiny, byte_ids(tiny, text.encode()))
    stream = IncrementalDetokenizer(tiny)
    texts = [stream.push([index]) for index in byte_ids(tiny, b"<|blank_80|>")]
    assert texts[-2:] == ["<|blank_80|", " " * 80]


def test_without_spacing_clean_up(tiny):
    raw = load_tokenizer("tiny")
    raw.clean_up_tokenization_spaces = False
    ids = tiny.encode_text("a , b do n't <n> x")
    check(raw, ids)
    assert IncrementalDetokenizer(raw).push(ids) == "a , b do n't \n x" != tiny.decode(ids)


def test_added_tokens():
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["<tool>"])
    ids = tokenizer.encode("hello <tool>world 你好<tool>", add_special_tokens=False)
    check(tokenizer, [*ids, *byte_ids(tokenizer, "😀 .".encode())[:-3], *ids])


def test_an_id_that_does_not_exist_leaves_the_text_alone(tiny):
    stream = IncrementalDetokenizer(tiny)
    hello = tiny.encode_text("hello")
    stream.push(hello)
    with pytest.raises(ValueError, match="Token id 1000000 is not in the vocabulary"):
        stream.push([*hello, 1000000])
    assert stream.push([]) == stream.finish() == "hello"
    assert stream.push([tiny.vocab_size]) == "hello"  # a row of the embedding without a piece


def test_each_id_is_decoded_once(tiny, monkeypatch):
    decoded = []

    class CountingModel:
        def __init__(self, model):
            self.model = model

        def PieceToId(self, piece):
            return self.model.PieceToId(piece)

        def DecodeIds(self, ids):
            decoded.append(len(ids))
            return self.model.DecodeIds(ids)

    cleaned = []
    monkeypatch.setattr(detokenizer, "clean_up_spacing", lambda text: cleaned.append(len(text)) or text)
    stream = IncrementalDetokenizer(tiny)
    stream._model = CountingModel(tiny.sp_tokenizer.model)
    ids = tiny.encode_text("hello, world! 你好，世界😀. " * 60)
    for index in ids:
        stream.push([index])
    assert len(ids) > 1000
    assert sum(decoded) < 3 * len(ids)  # each with the anchor before it and a blank at the start
    assert max(decoded) < 8 and max(cleaned) < 40
