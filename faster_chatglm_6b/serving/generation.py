"""One user's request in the event loop: one or several answers, their text and numbers as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .answer import AnswerText
from .engine import Engine, Job, News
from .rows.interface import RowRequest, RowToken
from .stop_strings import StopStrings


@dataclass
class Asked:
    """What one answer is asked for: a row, and how its tokens become text.

    Attributes:
        stop: strings that end the answer.
        is_chat: whether its text is cleaned up as ``chat`` does.
    """

    row: RowRequest
    stop: StopStrings = field(default_factory=StopStrings)
    is_chat: bool = True


@dataclass
class Piece:
    """What is new of one answer.

    Attributes:
        index: of the answer.
        text: what comes after its text so far.
        tokens: new tokens, without the one that ended the answer.
        count: new tokens with it.
        end: "stop" or "length" with the answer's last piece, else "".
    """

    index: int
    text: str = ""
    tokens: list[RowToken] = field(default_factory=list)
    count: int = 0
    end: str = ""

    def extend(self, later: Piece) -> None:
        """Append what came later of the same answer."""
        self.text += later.text
        self.tokens += later.tokens
        self.count += later.count
        self.end = later.end or self.end


class Owner(Protocol):
    """Who gets an answer's pieces."""

    def on_tokens(self, gap: float | None, answer: Answer, count: int) -> None:
        """Hear of a step with tokens: the seconds since the answer's last one, None for the first; their number."""

    def stop(self, answer: Answer) -> None:
        """End the answer's row, which computes more than is needed."""

    def add(self, answer: Answer, error: Exception | None) -> None:
        """Hear that an answer has something new, which ``answer.take`` returns."""


class Answer:
    """One answer's way from the engine to the pieces of its ``Generation``.

    Attributes:
        tokens: their number so far.
        end: why it has ended: "stop", "length", "abort" or "error"; else "".
        first_at, last_at: when its first and its last token were read, in seconds of ``time.monotonic``; 0 before.
    """

    def __init__(self, generation: Owner, index: int, asked: Asked, tokenizer: Any):
        self.generation, self._index = generation, index
        self._text = AnswerText(tokenizer, asked.stop, asked.is_chat)
        # Text is made when somebody takes it, of several tokens at once under load; a stop string must be seen at once.
        self._is_searched = bool(asked.stop.texts)
        self._unwritten: list[RowToken] = []
        self._piece = Piece(index)
        self._taken = 0
        self.asked = asked
        self.job: Job | None = None
        self.tokens = 0
        self.end = ""
        self.first_at = self.last_at = 0.0

    def receive(self, news: News) -> None:
        """Take what a step brought. It runs in the event loop, whether the user reads or not."""
        if self.end:
            return  # what the row gave until its end was noticed
        self._unwritten += news.tokens
        end, error, count = news.end, news.error, len(news.tokens)
        if self._is_searched:
            try:
                self._write(end)
            except ValueError as wrong:
                end, error = "error", wrong
            count = self._piece.count - (self.tokens - self._taken)
            if self._text.has_stopped:
                end = "stop"
        self.tokens += count
        if count:
            self.generation.on_tokens(news.at - self.last_at if self.last_at else None, self, count)
            self.first_at = self.first_at or news.at
            self.last_at = news.at
        self.end = end
        if end and end != news.end:
            self.generation.stop(self)
        self.generation.add(self, error)

    def take(self) -> Piece:
        """Return what is new since the last call.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        if not self._is_searched:
            self._write(self.end)
        piece, self._piece = self._piece, Piece(self._index)
        self._taken += piece.count
        piece.end = self.end
        return piece

    def _write(self, end: str) -> None:
        """Turn new tokens into text, up to a stop string."""
        tokens, self._unwritten = self._unwritten, []
        piece = self._piece
        for part in [[token] for token in tokens] if self._is_searched else [tokens]:
            shown = [token for token in part if token.end != "stop"]
            piece.count += len(part)
            piece.tokens += shown
            piece.text += self._text.push([token.token for token in shown])
            if self._text.has_stopped:
                return
        if end in ("stop", "length"):
            piece.text += self._text.finish()


class Generation:
    """The answers to one request. Iterate over ``pieces``, and call ``cancel`` however that ends."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        asked: Sequence[Asked],
        on_tokens: Callable[[float | None, Answer, int], None] = lambda *_: None,
        on_end: Callable[[Answer], None] = lambda *_: None,
        arrived: float | None = None,
    ):
        """Submit all answers.

        Args:
            on_tokens: called for each step with tokens: the seconds since the answer's step before, None for the first;
                the answer; the number of tokens.
            on_end: called once for each answer that has ended.
            arrived: when the request came, in seconds of ``time.monotonic``; now if left out.

        Raises:
            EngineClosed: the engine takes no more requests.
        """
        self._engine, self.on_tokens, self._on_end = engine, on_tokens, on_end
        self._fresh: dict[Answer, None] = {}
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self.arrived = time.monotonic() if arrived is None else arrived
        self.answers = [Answer(self, index, one, tokenizer) for index, one in enumerate(asked)]
        self._open = set()
        try:
            for answer in self.answers:
                answer.job = engine.submit(answer.asked.row, answer.receive)
                self._open.add(answer)
        except BaseException:
            self.cancel()
            raise

    def add(self, answer: Answer, error: Exception | None) -> None:
        """Hear that one of the answers has something new."""
        self._fresh[answer] = None
        self._error = self._error or error
        if answer.end:
            self._close(answer)
        self._changed.set()

    def _close(self, answer: Answer) -> None:
        if answer in self._open:
            self._open.remove(answer)
            self._on_end(answer)

    def stop(self, answer: Answer) -> None:
        """End the row of an answer, which needs no more tokens."""
        if answer.job is not None:
            self._engine.cancel(answer.job)

    def cancel(self) -> None:
        """End every answer that has not ended. Their rows are free after the step that runs, or the next."""
        for answer in [*self._open]:
            answer.end = "abort"
            self.stop(answer)
            self._close(answer)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield pieces until all answers have ended. What came of an answer while nobody asked is one piece.

        Raises:
            Exception: the one with which the engine ended an answer. The others are cancelled.
        """
        while self._open or self._fresh:
            await self._changed.wait()
            self._changed.clear()
            fresh, self._fresh = self._fresh, {}
            if self._error is not None:
                self.cancel()
                raise self._error
            for answer in fresh:
                try:
                    piece = answer.take()
                except ValueError:  # a token without text
                    self.cancel()
                    raise
                yield piece

    async def whole(self) -> list[Piece]:
        """Return each answer in one piece, in their order.

        Raises:
            Exception: as ``pieces`` does.
        """
        answers = [Piece(index) for index in range(len(self.answers))]
        async for piece in self.pieces():
            answers[piece.index].extend(piece)
        return answers
