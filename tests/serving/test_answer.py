"""Text that a client gets in pieces is never taken back, and holds no part of a stop string."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faster_chatglm_6b.serving.answer import AnswerText
from faster_chatglm_6b.serving.stop_strings import StopSearch, StopStrings
from faster_chatglm_6b.templates.prompts import process_response

TEXTS = st.text(
    st.sampled_from([*"你好中,!:;?[]训练时间 \n\tab'ntsv<>|日本€\U0001f600"]) | st.characters(), max_size=40
)
IDS = st.lists(st.integers(0, 2047), max_size=30)


def pieces(tokenizer, ids, stop=(), is_chat=True) -> list[str]:
    text = AnswerText(tokenizer, StopStrings(stop), is_chat)
    given = []
    for token in ids:
        given.append(text.push([token]))
        if text.has_stopped:
            return given
    return [*given, text.finish()]


@given(st.data())
def test_the_pieces_are_the_text(chat_tokenizer, data):
    valid = data.draw(TEXTS).encode("utf-8", "ignore").decode()
    ids = [*chat_tokenizer.encode_text(valid), *data.draw(IDS)]
    assert "".join(pieces(chat_tokenizer, ids, is_chat=False)) == chat_tokenizer.decode(ids)
    assert "".join(pieces(chat_tokenizer, ids)) == process_response(chat_tokenizer.decode(ids))


@given(st.data())
def test_no_part_of_a_stop_string_is_given(chat_tokenizer, data):
    ids = chat_tokenizer.encode_text(data.draw(TEXTS).encode("utf-8", "ignore").decode())
    whole = chat_tokenizer.decode(ids)
    begin = data.draw(st.integers(0, len(whole)))
    cut = whole[begin : begin + data.draw(st.integers(1, 6))]
    stop = [
        text for text in (cut, *data.draw(st.lists(st.sampled_from(["\n", "好,", "ab", "中文"]), max_size=2))) if text
    ]
    places = [place for text in stop if (place := whole.find(unicodedata.normalize("NFKC", text))) >= 0]
    given = "".join(pieces(chat_tokenizer, ids, stop, is_chat=False))
    assert given == (whole[: min(places)] if places else whole)


def test_a_stop_string_over_several_tokens(chat_tokenizer):
    ids = chat_tokenizer.encode_text("one two END three")
    given = pieces(chat_tokenizer, ids, ["END"])
    assert "".join(given) == "one two" and not any("E" in piece for piece in given)
    almost = pieces(chat_tokenizer, chat_tokenizer.encode_text("one two ENd three"), ["END"])
    assert "".join(almost) == "one two ENd three"


@pytest.mark.parametrize("stop", ["，", ","])
def test_a_mark_stops_in_both_of_its_forms(chat_tokenizer, stop):
    assert "".join(pieces(chat_tokenizer, chat_tokenizer.encode_text("你好，我是"), [stop])) == "你好"


def test_a_character_waits_for_its_last_byte(chat_tokenizer):
    ids = chat_tokenizer.encode_text("a\U0001f600b")
    given = pieces(chat_tokenizer, ids)
    assert "".join(given) == "a\U0001f600b" and "\N{REPLACEMENT CHARACTER}" not in "".join(given)


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=6), max_size=3), st.integers(1, 5))
def test_the_search_finds_what_a_search_of_the_whole_text_does(text, stop, step):
    search = StopSearch(StopStrings(stop))
    for end in range(0, len(text) + step, step):
        known = text[:end]
        found = search.push(known)
        assert found == min((place for one in stop if (place := known.find(one)) >= 0), default=None)
        if found is not None:
            return
        beginnings = [length for one in stop for length in range(len(one)) if known.endswith(one[:length])]
        assert search.held == max(beginnings, default=0)


def test_a_long_stop_string_is_read_once_and_not_per_token():
    class Counted(str):
        """Counts the characters that are asked for."""

        asked = 0

        def __getitem__(self, key):
            Counted.asked += 1
            return str.__getitem__(self, key)

    stop = StopStrings("a" * 5000 + "b")
    stop.texts = tuple(map(Counted, stop.texts))
    search = StopSearch(stop)
    for length in range(1, 4001):
        assert search.push("a" * length) is None and search.held == length
    assert Counted.asked <= 3 * 4000
    assert search.push("a" * 5001 + "b") == 1


def test_an_empty_stop_string_is_refused_and_one_text_is_one_string():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
    assert StopStrings("\uff25ND").texts == ("END",)
