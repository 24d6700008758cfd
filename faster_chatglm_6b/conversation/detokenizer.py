"""Turn a growing list of token ids into text, for streaming.

``tokenizer.decode`` of everything so far, at every token, takes time that grows with the square of the answer. Here
each id goes through sentencepiece once. Each stretch of text goes once through the two steps after it (markers to
whitespace, English spacing), as soon as no later text can change its result.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..tokenization_chatglm import ChatGLMTokenizer
from ..tokenizer.ice_text import LINE_BREAK_PIECE, clean_up_spacing, unmark_whitespace

_LONGEST_UNFINISHED_MARKER = len("<|blank_80|")
# Characters of unfinished spacing rules (" n't", " 've", " ' ", ...), all starting with the blank, that can end a text.
_UNFINISHED_SPACING_RULES = " 'nvr"
_LONGEST_UNFINISHED_CHARACTER = 3  # bytes


class IncrementalDetokenizer:
    """Decoder of ids as they come: ``push`` returns what ``tokenizer.decode`` returns for all ids so far.

    Only the bytes of an unfinished UTF-8 character at the end are held back until it is finished. If it cannot be
    finished any more, they become U+FFFD, one each. As with ``tokenizer.decode``, later ids can change text shown
    before: a blank goes away before punctuation, and "<", "n", ">" become a line break.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer):
        self._tokenizer = tokenizer
        self._cleans_up = tokenizer.clean_up_tokenization_spaces
        self._model = tokenizer.sp_tokenizer.model
        self._byte_of_id = tokenizer.sp_tokenizer.byte_of_id
        # Texts of single ids are kept for all answers: sentencepiece takes long for one.
        self._text_of_id = tokenizer.sp_tokenizer.text_of_id
        # Asked once: the tokenizer looks it up anew each time.
        self._pad_id, self._vocab_size = tokenizer.pad_token_id, tokenizer.vocab_size
        # Decoded before other ids, then cut off: so sentencepiece does not take those for a text's start.
        self._anchor = self._model.PieceToId(LINE_BREAK_PIECE)
        self._all_ids: list[int] = []
        self._ids: list[int] = []  # the last of all ids, whose text is not final
        self._has_text = False  # whether the ids before those gave any text
        self._marked = ""  # the last text of those before, which may end inside a marker
        self._spaced = ""  # the text before that, whose spacing may change
        self._settled = ""  # the text before that
        self._has_added_tokens = False

    def push(self, ids: Iterable[int]) -> str:
        """Take further ids and return the whole text so far, without an unfinished last character.

        Raises:
            ValueError: as ``take``.
        """
        self.take(ids)
        if self._has_added_tokens:
            # Such tokens cut the text into parts that are decoded apart. They are rare: leave them to the tokenizer.
            return self._tokenizer.decode(self._all_ids[: len(self._all_ids) - self._unfinished_ids()])
        return self._text()

    def take(self, ids: Iterable[int]) -> None:
        """Take further ids, for ``settled`` and ``finish``.

        Raises:
            ValueError: ChatGLM-6B has no such id. Nothing of that call is taken.
        """
        ids = [int(index) for index in ids]
        first = self._tokenizer.num_image_tokens
        is_plain = ids and min(ids) >= first and max(ids) < self._vocab_size
        if not is_plain or self._pad_id in ids:
            ids = self._tokenizer.decodable_ids(ids)
        self._all_ids += ids
        self._ids += [index - first for index in ids] if first else ids
        if ids and (max(ids) >= self._vocab_size or min(ids) < first):
            self._has_added_tokens = True
        if not self._has_added_tokens:
            self._settle_ids()
            self._settle_text()

    def settled(self) -> str:
        """Return the beginning of the text that no later id can change: what may be shown for good."""
        return self._settled

    def finish(self) -> str:
        """Return the text of all ids as ``tokenizer.decode`` does: bytes still held back are U+FFFD."""
        if self._has_added_tokens:
            return self._tokenizer.decode(self._all_ids)
        return self._text(self._decode(self._ids))

    def _settle_ids(self) -> None:
        ready = self._ids[: len(self._ids) - self._unfinished_ids()]
        text = self._decode(ready)
        # Without any text yet, these are dropped blanks, on which the next id's text depends.
        if text or self._has_text:
            self._has_text = True
            self._marked += text
            del self._ids[: len(ready)]

    def _settle_text(self) -> None:
        end = _end_of_whole_markers(self._marked)
        self._spaced += unmark_whitespace(self._marked[:end])
        self._marked = self._marked[end:]
        end = _end_of_certain_spacing(self._spaced) if self._cleans_up else len(self._spaced)
        self._settled += self._clean_up(self._spaced[:end])
        self._spaced = self._spaced[end:]

    def _text(self, last: str = "") -> str:
        return self._settled + self._clean_up(self._spaced + unmark_whitespace(self._marked + last))

    def _clean_up(self, text: str) -> str:
        return clean_up_spacing(text) if self._cleans_up else text

    def _decode(self, ids: list[int]) -> str:
        """Return sentencepiece's text, markers and all, of ``ids`` that come after all others."""
        if not ids:
            return ""
        if not self._has_text:
            return self._model.DecodeIds(ids)
        known = [self._text_of_id.get(index) for index in ids]
        if None not in known:
            return "".join(known)
        text = self._model.DecodeIds([self._anchor, *ids])[len(LINE_BREAK_PIECE) :]
        # Bytes make characters together; any other id has its own text.
        if len(ids) == 1 and ids[0] not in self._byte_of_id:
            self._text_of_id[ids[0]] = text
        return text

    def _unfinished_ids(self) -> int:
        """Count the ids at the end that are the first bytes of a character whose other bytes may still come."""
        tail = b""
        for index in reversed(self._ids[-_LONGEST_UNFINISHED_CHARACTER:]):
            byte = self._byte_of_id.get(index)
            if byte is None:
                return 0
            tail = bytes([byte]) + tail
            if byte >= 0xC0:  # a first byte
                return len(tail) if _is_unfinished_character(tail) else 0
        return 0


def _is_unfinished_character(start: bytes) -> bool:
    """Tell whether ``start``, a first byte and those after it, is no UTF-8 character yet but can become one."""
    missing = (2 if start[0] < 0xE0 else 3 if start[0] < 0xF0 else 4) - len(start)
    # Some first bytes limit the second one, from below or from above, but never exclude both of these.
    return missing > 0 and any(_is_utf8(start + filler * missing) for filler in (b"\x80", b"\xbf"))


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _end_of_whole_markers(text: str) -> int:
    """Return the length of the start of ``text`` that ends in no unfinished marker."""
    start = text.rfind("<", max(0, len(text) - _LONGEST_UNFINISHED_MARKER))
    return len(text) if start < 0 or ">" in text[start:] else start


def _end_of_certain_spacing(text: str) -> int:
    """Return the length of the start of ``text`` whose spacing does not depend on what follows.

    A spacing rule reaches beyond the end of a text only if the text ends in the start of its pattern. Rules remove
    nothing but blanks, so such a start, blank and all, lies within the characters of such starts at the text's end.
    """
    before = len(text.rstrip(_UNFINISHED_SPACING_RULES))
    return before if " " in text[before:] else len(text)
