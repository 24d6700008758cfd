"""Find stop strings in a text that grows, in time that does not depend on their length."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request, prepared once for all of its answers.

    Attributes:
        texts: in the vocabulary's half-width form.
        tables: for each text and each of its beginnings, the length of the longest shorter beginning that this one
            ends with (Knuth, Morris and Pratt).
    """

    def __init__(self, stop: str | Sequence[str] = ()):
        """Prepare.

        Args:
            stop: one string, or several.

        Raises:
            ValueError: a string is empty.
        """
        given = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in given:
            raise ValueError("A stop string is empty; leave it out.")
        self.texts = tuple(unicodedata.normalize("NFKC", text) for text in given)
        self.tables = tuple(_table(text) for text in self.texts)


class StopSearch:
    """The search of one answer for its stop strings.

    Attributes:
        held: how many characters at the text's end may be the beginning of a stop string.
    """

    def __init__(self, stop: StopStrings):
        self._stop = stop
        self._matched = [0] * len(stop.texts)
        self._length = 0
        self.held = 0

    def push(self, text: str) -> int | None:
        """Read on.

        Args:
            text: all of it so far; what was read before is not read again.

        Returns:
            where the first stop string begins, or None if there is none yet.
        """
        new = text[self._length :]
        places = []
        for number, (stop, table) in enumerate(zip(self._stop.texts, self._stop.tables, strict=True)):
            matched = self._matched[number]
            for index, character in enumerate(new):
                while matched and stop[matched] != character:
                    matched = table[matched - 1]
                if stop[matched] == character:
                    matched += 1
                if matched == len(stop):
                    places.append(self._length + index + 1 - matched)
                    break
            else:
                self._matched[number] = matched
        self._length = len(text)
        self.held = max(self._matched, default=0)
        return min(places, default=None)


def _table(text: str) -> tuple[int, ...]:
    lengths = [0]
    for character in text[1:]:
        matched = lengths[-1]
        while matched and text[matched] != character:
            matched = lengths[matched - 1]
        lengths.append(matched + (text[matched] == character))
    return tuple(lengths)
