"""Rows on the model's own forward, one after the other: right on every device, and as slow as request by request.

Each row has a cache of its own, so its tokens are those that it would get alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...decoding.loop import engine_of
from ...decoding.memory import cache_bytes, free_bytes, shown, workspace_bytes
from ...layers.placement import input_device
from ...network.prompt_layout import PromptLayout
from ...ops.caches import CACHE_NAME, DynamicCache
from .choice import choose
from .interface import NewRow, RowFailure, RowRequest, RowToken

PAGE_TOKENS = 64
# Long enough that a thread which waits for the model wakes up and takes it.
_BREATH = 1e-4


@dataclass
class _Row:
    request: RowRequest
    layout: PromptLayout
    cache: Any
    answer: list[int] = field(default_factory=list)
    has_ended: bool = False


class PlainRows:
    """``Rows`` on any ``ChatGLMForConditionalGeneration``. Pages are only counted: each row's cache grows by itself."""

    def __init__(self, model: Any, rows: int, pages: int):
        self._model, self._lock = model, engine_of(model)
        self.rows, self.pages, self.page_tokens = rows, pages, PAGE_TOKENS
        self._running: dict[int, _Row] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock that the captured loop of other threads' ``chat`` holds."""
        with self._lock.lock:
            self._lock.touch()
            try:
                yield
            finally:
                self._lock.end()
        time.sleep(_BREATH)

    @torch.no_grad()
    def start(self, new: Sequence[NewRow]) -> list[RowToken | RowFailure]:
        """Read each prompt and choose its first token."""
        return [self._start(one) for one in new]

    def _start(self, new: NewRow) -> RowToken | RowFailure:
        try:
            ids = torch.tensor([new.request.ids])
            row = _Row(new.request, PromptLayout.of(ids, self._model.config), DynamicCache())
            self._running[new.row] = row
            return self._next(new.row, row, ids, None)
        except Exception as error:
            return RowFailure(new.row, error)

    @torch.no_grad()
    def step(self) -> list[RowToken | RowFailure]:
        """Choose the next token of each row that has not ended."""
        return [self._step(place, row) for place, row in sorted(self._running.items()) if not row.has_ended]

    def _step(self, place: int, row: _Row) -> RowToken | RowFailure:
        try:
            last = len(row.request.ids) + len(row.answer) - 1
            positions = row.layout.position_ids(last, last + 1, self._model.config.position_encoding_2d)
            return self._next(place, row, torch.tensor([row.answer[-1:]]), positions)
        except Exception as error:
            row.has_ended = True
            return RowFailure(place, error)

    def _next(self, place: int, row: _Row, ids: torch.Tensor, positions: torch.Tensor | None) -> RowToken:
        device = input_device(self._model)
        output = self._model(
            input_ids=ids.to(device),
            position_ids=None if positions is None else positions.to(device),
            past_key_values=row.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        row.cache = getattr(output, CACHE_NAME)
        token, logprobs = choose(output.logits[0, -1], row.request, row.answer)
        row.answer.append(token)
        end = "length" if len(row.answer) >= row.request.max_tokens else ""
        end = "stop" if token in row.request.end_ids else end
        row.has_ended = bool(end)
        return RowToken(place, token, end, logprobs)

    def stop(self, row: int) -> None:
        """Forget a row and its cache."""
        self._running.pop(row, None)


def pages_for(model: Any, rows: int, share: float) -> int:
    """Return how many pages of keys and values a server may fill.

    Args:
        rows: most rows that run at once; more pages than they could fill are never asked for.
        share: of the memory that is free now.

    Raises:
        ValueError: not even one row of the model's longest sequence fits.
    """
    longest = model.config.max_sequence_length
    most = rows * -(-longest // PAGE_TOKENS)
    free = free_bytes(model.device)
    if free is None:
        return most
    # A cache that grows by copying holds one layer twice for a moment; the largest prompt needs room to be read.
    page = cache_bytes(model, 1, PAGE_TOKENS) * (model.config.num_layers + 1) // model.config.num_layers
    pages = int(free * share - workspace_bytes(model, 1, longest)) // page
    if pages * PAGE_TOKENS < longest:
        raise ValueError(
            f"{shown(free)} of memory is free, of which the server may take {share:.0%}; a prompt of {longest} tokens "
            f"needs {shown(workspace_bytes(model, 1, longest) + page * -(-longest // PAGE_TOKENS))}. Raise --memory, "
            "load with --bits 4 or free memory."
        )
    return min(pages, most)
