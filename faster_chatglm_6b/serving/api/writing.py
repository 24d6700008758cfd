"""Write answers as OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from typing import Any

from ..generation import Generation, Piece
from ..rows.interface import RowToken
from .protocol import StreamOptions


class TokenNames:
    """Texts and bytes of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @cached_property
    def _bytes(self) -> list[bytes]:
        return self._tokenizer.sp_tokenizer.bytes_of_ids()

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text; nothing for a control token."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def text_of(self, token: int) -> str:
        """Return a token's text; a part of a character is written as ``bytes:\\xe4``."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Writer:
    """The objects of one request; ``kind`` is "chat.completion" or "text_completion".

    Args:
        prompt_tokens: of all prompts, each counted once.
        reported: alternatives to report for each token; None for no log-probabilities.
    """

    def __init__(self, kind: str, model: str, names: TokenNames, prompt_tokens: int, reported: int | None):
        self._is_chat = kind == "chat.completion"
        self._names, self._prompt_tokens, self._reported = names, prompt_tokens, reported
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._base = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
        self._counts: dict[int, int] = {}
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the object of finished answers."""
        choices = []
        for piece in pieces:
            self._counts[piece.index] = piece.count
            content = {"message": {"role": "assistant", "content": piece.text}}
            choices.append(
                {
                    "index": piece.index,
                    **(content if self._is_chat else {"text": piece.text}),
                    "logprobs": self._logprobs(piece),
                    "finish_reason": piece.end,
                }
            )
        return {**self._base, "choices": choices, "usage": self._usage()}

    async def events(self, generation: Generation, options: StreamOptions | None) -> AsyncIterator[dict[str, Any]]:
        """Yield the objects of a stream."""
        options = options or StreamOptions()
        if self._is_chat:
            self._base = {**self._base, "object": "chat.completion.chunk"}
            for index in range(len(generation.answers)):
                yield self._chunk(index, {"role": "assistant", "content": ""}, options=options)
        async for piece in generation.pieces():
            self._counts[piece.index] = self._counts.get(piece.index, 0) + piece.count
            logprobs = self._logprobs(piece)
            # The end comes in a chunk of its own, as OpenAI's does: some clients drop text that comes with it.
            if piece.text or (logprobs is not None and piece.tokens):
                yield self._chunk(piece.index, {"content": piece.text}, logprobs, options=options)
            if piece.end:
                yield self._chunk(piece.index, {}, end=piece.end, options=options)
        if options.include_usage:
            yield {**self._base, "choices": [], "usage": self._usage()}

    def _chunk(
        self, index: int, delta: dict[str, str], logprobs: Any = None, end: str | None = None, *, options: StreamOptions
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        chunk = {
            **self._base,
            "choices": [{"index": index, **content, "logprobs": logprobs, "finish_reason": end}],
        }
        if options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        elif options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, int]:
        made = sum(self._counts.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._reported is None:
            return None
        if self._is_chat:
            return {"content": [self._chat_entry(token) for token in piece.tokens], "refusal": None}
        texts = [self._names.text_of(token.token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(piece.index, 0))
            self._offsets[piece.index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprobs.chosen for token in piece.tokens],
            "top_logprobs": [
                {self._names.text_of(index): value for index, value in token.logprobs.top} for token in piece.tokens
            ],
            "text_offset": offsets,
        }

    def _chat_entry(self, token: RowToken) -> dict[str, Any]:
        top = [self._named(index, value) for index, value in token.logprobs.top[: self._reported]]
        return {**self._named(token.token, token.logprobs.chosen), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._names.text_of(token),
            "logprob": max(logprob, -9999.0),
            "bytes": [*self._names.bytes_of(token)],
        }
