"""Make the rows that suit a model and its device, in the memory that a server may take."""

from __future__ import annotations

import logging
import time
from typing import Any

from ...decoding.memory import cache_bytes, free_bytes, shown, workspace_bytes
from ...decoding.refusal import CannotServe, check_model, check_place
from ...decoding.request import check_speculate
from ...decoding.shortage import is_out_of_memory
from .interface import Rows
from .plain import PlainRows, pages_for

_log = logging.getLogger("faster_chatglm_6b.serving")
# On a GPU, for captured graphs, the workspaces of library kernels, and weights that a long prompt dequantises.
_RESERVED_BYTES = 1 << 30


def make_rows(model: Any, rows: int, memory: float, speculate: int | str = 0) -> Rows:
    """Return rows in the captured loop if it can run the model, otherwise rows on the plain path.

    Args:
        model: a ``ChatGLMForConditionalGeneration``.
        rows: most answers at once.
        memory: share of the free memory for keys and values.
        speculate: ids that a step in the captured loop drafts for each of a few rows, as of ``generate``: 0, 3, 7 or
            "auto".

    Raises:
        ValueError: memory is too short, and the message says what would do; or ``speculate`` is another value.
    """
    check_speculate(speculate)
    try:
        check_place(model)
        check_model(model)
        captured = _captured_rows(model, rows, memory, speculate)
    except CannotServe as reason:
        _log.warning("Rows run one after the other on the plain path, because %s.", reason)
        if speculate:
            _log.warning("speculate is %s, which changes nothing there: only the captured loop drafts.", speculate)
        return PlainRows(model, rows, pages_for(model, rows, memory))
    return captured


def _captured_rows(model: Any, rows: int, memory: float, speculate: int | str) -> Rows:
    from .captured import PAGE_TOKENS, CapturedRows

    before = free_bytes(model.device)
    try:
        captured = CapturedRows(model, rows, speculate=speculate)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{shown(before)} of memory is free, which is too little for the buffers of {rows} rows; lower --max-rows, "
            "load with --bits 4 or free memory."
        ) from None
    longest = -(-model.config.max_sequence_length // PAGE_TOKENS)
    most, page = rows * longest, cache_bytes(model, 1, PAGE_TOKENS)
    free, reserved = free_bytes(model.device), _RESERVED_BYTES
    if model.device.type != "cuda":
        reserved = workspace_bytes(model, 1, model.config.max_sequence_length)
    pages = most if free is None else min(int(free * memory - reserved) // page, most)
    if pages < longest:
        raise ValueError(
            f"{shown(free)} of memory is free beside the buffers of {rows} rows, of which the server may take "
            f"{memory:.0%}; a sequence of {model.config.max_sequence_length} tokens needs "
            f"{shown(page * longest + reserved)}. Raise --memory, lower --max-rows, load with --bits 4 or free "
            "memory."
        )
    captured.place_pages(pages)
    start = time.monotonic()
    captured.warm_up()
    _log.info("Rows run in the captured loop: %d rows, keys and values of %d tokens.", rows, pages * PAGE_TOKENS)
    if captured.graphs.captures:
        _log.info("Its steps were captured in %.0f s.", time.monotonic() - start)
    return captured
