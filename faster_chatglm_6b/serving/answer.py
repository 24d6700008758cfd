"""Turn a row's tokens into text of which no character, once given, is taken back; find stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..conversation.detokenizer import IncrementalDetokenizer
from ..templates.prompts import process_response
from .stop_strings import StopSearch, StopStrings

# ``process_response`` replaces this text, and makes these marks full-width before a Chinese character.
_REPLACED = "[[训练时间]]"
_MARKS = ",!:;?"


class AnswerText:
    """The text of one answer while it grows.

    ``push`` and ``finish`` return what is new. Text is held back while later tokens can change it, and while it may be
    the beginning of a stop string. All that was returned, joined, is the text up to the first stop string.

    Attributes:
        has_stopped: whether a stop string has come. Nothing may be pushed after it.
    """

    def __init__(self, tokenizer: Any, stop: StopStrings | None = None, is_chat: bool = True):
        """Begin an empty answer.

        Args:
            tokenizer: the checkpoint's.
            stop: strings that end the answer and do not appear in it. They are compared in the vocabulary's half-width
                form, as ``chat(stop_strings=...)`` does.
            is_chat: clean the text up as ``chat`` does; otherwise it is what ``tokenizer.decode`` gives.
        """
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._search = StopSearch(stop or StopStrings())
        self._is_chat = is_chat
        self._begin = 0  # of the part that is still cleaned up, with a character before it
        self._given = ""  # of that part
        self.has_stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens and return the text that is certain now and was not before.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        self._detokenizer.take(tokens)
        return self._advance(self._detokenizer.settled(), is_whole=False)

    def finish(self) -> str:
        """Return the rest of the text: no more tokens come."""
        return "" if self.has_stopped else self._advance(self._detokenizer.finish(), is_whole=True)

    def _advance(self, text: str, is_whole: bool) -> str:
        place = self._search.push(text)
        if place is not None:
            self.has_stopped = is_whole = True
            text = text[:place]
        elif not is_whole:
            text = text[: len(text) - self._search.held]
        part = text[self._begin :]
        shown, held = part, 0
        if self._is_chat:
            shown = process_response(part)
            held = 0 if is_whole else max(_overlap(shown, _REPLACED), int(shown[-1:] in _MARKS))
            shown = shown[: len(shown) - held]
        new = shown[len(self._given) :]
        self._given += new
        if new and not held and text[-1] == shown[-1] and text[-1].isalnum():
            # What comes before such a character has no influence on what comes after it.
            self._begin, self._given = len(text) - 1, text[-1]
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins, without being all of it."""
    if stop[0] not in text[1 - len(stop) :]:
        return 0
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
