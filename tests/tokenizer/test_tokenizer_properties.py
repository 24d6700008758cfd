"""Any text survives the tokenizer, whole or streamed, up to the normalisation that is written down here."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_profiles import examples
from tokenizer_data import load_tokenizer

from faster_chatglm_6b.conversation.detokenizer import IncrementalDetokenizer

HALF = "\N{REPLACEMENT CHARACTER}"

# sentencepiece's "nmt_nfkc", which both vocabularies name: the first set vanishes, the second becomes a blank, the
# full-width tilde stays, and all else is NFKC, character by character.
DROPPED = {*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F}
BLANKS = {0x09, 0x0A, 0x0C, 0x0D, 0x1680, 0x200B, 0x200C, 0x200E, 0x200F, 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD}
KEPT = {0xFF5E}
# The two vocabularies' tables come from different releases of Unicode, which treat these differently.
DIFFERENT = {0x200D, 0x061C}
MARKER = re.compile(r"(<n>|<\|tab\|>|<\|blank_(?:[2-9]|[1-7][0-9]|80)\|>)")
SPACING = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def normalised_characters(text: str) -> str:
    """Return ``text`` after sentencepiece's normalisation of characters."""
    kept = (" " if ord(c) in BLANKS else c for c in text if ord(c) not in DROPPED)
    return "".join(c if ord(c) in KEPT else unicodedata.normalize("NFKC", c) for c in kept)


def normalised(text: str, characters=normalised_characters) -> str:
    """Return what comes back for ``text`` after the tokenizer's documented normalisation.

    Line breaks, tabs and runs of 2 to 80 blanks survive as markers. The characters around them are normalised. A run of
    blanks that is left (from full-width blanks, or from more than 80) becomes one, and blanks at either end go. Markers
    become whitespace if the text spelled them out or normalisation made them of full-width characters. The blank before
    English punctuation and contractions goes last.
    """
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
    text = "".join(part if MARKER.fullmatch(part) else characters(part) for part in MARKER.split(text))
    text = re.sub(" +", " ", text).strip(" ")
    text = MARKER.sub(lambda marker: whitespace(marker[0]), text)
    for spaced, closed in SPACING:
        text = text.replace(spaced, closed)
    return text


def whitespace(marker: str) -> str:
    return {"<n>": "\n", "<|tab|>": "\t"}.get(marker) or " " * int(re.sub(r"\D", "", marker))


def second_halves() -> set[str]:
    """Return characters that NFKC may join with the one before; sentencepiece's table joins the usual pairs only."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"}
    return seconds | {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}


def is_the_same_everywhere(character: str) -> bool:
    """Return True if every release of Unicode since 3.2 that knows the character normalises it alike and alone."""
    old, new = unicodedata.ucd_3_2_0, unicodedata.normalize("NFKC", character)
    if unicodedata.category(character) in ("Cn", "Cs") or unicodedata.combining(character):
        return False
    known = old.category(character) != "Cn" and old.normalize("NFKC", character) == new
    return (known or new == character) and not any(unicodedata.combining(c) for c in new)


NO_CHARACTERS_OF_THEIR_OWN = second_halves() | {chr(code) for code in DIFFERENT}
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"]).filter(
    lambda c: c not in NO_CHARACTERS_OF_THEIR_OWN and is_the_same_everywhere(c)
)
FRAGMENTS = st.sampled_from(
    [
        *("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>", "<s>", "</s>", "<image_3>", "<0x0A>"),
        *("<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<|blank_81|>", "<|blank_1|>", "＜n＞", "<", "|", ">", "_"),
        *("\n", "\t", "\r\n", " ", "  ", " " * 80, " " * 81, " " * 163, "\u3000", "\u3000\u3000", "▁", "\x00", "\x7f"),
        *(" .", " ,", " ?", " n't", " 's", " ' ", "'", "你好", "，。！？：", "ＡＢＣ", "~", "～", "㈱", "ﬁ", "😀", "é"),
        *("\u200b", "\ufeff", HALF, "don't", "hello world", "1234567890", "def f(x):\n    return x"),
    ]
)
TEXTS = st.lists(st.one_of(FRAGMENTS, CHARACTERS, st.text(CHARACTERS, max_size=12)), max_size=12).map("".join)
ANY_TEXT = st.lists(st.one_of(FRAGMENTS, st.text(max_size=12)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=["tiny", "real"])
def tokenizer(request):
    return load_tokenizer(request.param)


@examples(short=300, long=20_000)
@given(text=TEXTS)
def test_a_text_comes_back_normalised(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text)) == normalised(text)


@examples(short=200, long=20_000)
@given(text=ANY_TEXT)
def test_any_unicode_comes_back_as_sentencepiece_normalises_it(tokenizer, text):
    """sentencepiece's own table says what becomes of marks that combine and of characters newer than the vocabulary."""

    def characters(part: str) -> str:
        # The text stands between letters, since sentencepiece drops blanks at the ends.
        return tokenizer.sp_tokenizer.model.Normalize(f"x{part}x").replace("▁", " ")[2:-1]

    assert tokenizer.decode(tokenizer.encode_text(text)) == normalised(text, characters)


@examples(short=200, long=20_000)
@given(text=ANY_TEXT)
def test_no_text_holds_control_ids(tokenizer, text):
    ids = tokenizer.encode_text(text)
    model = tokenizer.sp_tokenizer.model
    assert not any(model.IsControl(index) or model.IsUnknown(index) for index in ids)
    assert not set(ids) & {*tokenizer.all_special_ids, tokenizer.gmask_token_id, tokenizer.end_token_id}
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    if not tokenizer._holds_special_token(text):
        assert tokenizer(text)["input_ids"] == [*ids, tokenizer.gmask_token_id, tokenizer.bos_token_id]


@examples(short=150, long=10_000)
@given(text=ANY_TEXT, data=st.data())
def test_a_streamed_text_has_whole_characters_at_every_cut(tokenizer, text, data):
    ids = tokenizer.encode_text(text)
    cuts = data.draw(st.sets(st.integers(0, len(ids)), max_size=8)) if len(ids) > 60 else range(len(ids) + 1)
    stream, taken = IncrementalDetokenizer(tokenizer), 0
    for end in sorted({*cuts, len(ids)}):
        shown = stream.push(ids[taken:end])
        taken = end
        # No text holds U+FFFD itself: normalisation makes it a blank.
        assert HALF not in shown and shown == tokenizer.decode(ids[:end]).rstrip(HALF)
        assert stream.finish() == tokenizer.decode(ids[:end])
    assert shown == tokenizer.decode(ids)


@examples(short=100, long=2_000)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4), multiple=st.sampled_from([None, 8]))
def test_a_padded_batch_holds_each_text(tokenizer, texts, multiple):
    batch = tokenizer(texts, padding=True, pad_to_multiple_of=multiple)
    assert len({len(row) for row in batch["input_ids"]}) == 1
    assert multiple is None or len(batch["input_ids"][0]) % multiple == 0
    for text, row in zip(texts, batch["input_ids"], strict=True):
        alone = tokenizer(text)["input_ids"]
        assert row == [tokenizer.pad_token_id] * (len(row) - len(alone)) + alone
        assert tokenizer.decode(row) == tokenizer.decode(alone)
