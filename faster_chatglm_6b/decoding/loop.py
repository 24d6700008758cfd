"""Serve one request token by token: prefill, decode, stop."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .engine import DecodeEngine
from .refusal import check_model, too_little_for_the_loop
from .request import Request
from .session import Session
from .shortage import is_out_of_memory, reclaim


def captured_tokens(model: Any, request: Request) -> Iterator[torch.Tensor]:
    """Yield the next tokens, int64 [B] on the CPU, with the pad id for sequences that ended before.

    It first waits for the requests of other threads. It releases the model at its end, however that comes.

    Raises:
        CannotServe: before the first token: the captured loop cannot run the model, this thread already uses it, or
            memory is too short.
    """
    engine = engine_of(model)
    engine.refuse_own_thread()
    with engine.lock:
        try:
            engine.touch()
            run = CapturedRun(model, request, engine)
            for index in itertools.count():
                token, is_last = run.next(index)
                yield token
                if is_last:
                    break
        finally:
            engine.end()


class CapturedRun:
    """One request on the model's engine, whose lock the caller holds.

    Raises:
        CannotServe: the captured loop cannot run the model, or memory is too short.
    """

    def __init__(self, model: Any, request: Request, engine: DecodeEngine):
        self._model, self._request, self._engine = model, request, engine
        batch, length = request.input_ids.shape
        self._limit = max(request.max_length - length, 1)
        self._finished = torch.zeros(batch, dtype=torch.bool)
        self._eos_ids = torch.tensor(request.eos_ids, dtype=torch.int64)
        # Checked with the lock held: no other request can change the model now.
        self._key, self._seed = check_model(model), None
        self._session = self._make_session()

    def _make_session(self) -> Session:
        batch, length = self._request.input_ids.shape
        keys = (self._model.config.pre_seq_len or 0) + length + self._limit
        with self._on_device():
            return self._engine.session(self._model, self._key, batch, keys)

    def _on_device(self) -> contextlib.AbstractContextManager:
        device = self._model.lm_head.weight.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    # Entered for each token: held over a yield, it would switch the caller's autograd off.
    @torch.no_grad()
    def next(self, index: int) -> tuple[torch.Tensor, bool]:
        """Return token ``index`` and whether it is the last; queue later ones first, so that the device never waits.

        Raises:
            CannotServe: memory is too short to begin.
        """
        self._engine.touch()
        request = self._request
        with self._on_device():
            self._queue(index)
            token = self._session.read(index)
            if request.has_end:
                token = token.masked_fill(self._finished, request.pad_id)
            self._finished |= torch.isin(token, self._eos_ids)
            if request.host_criteria is not None:
                self._ask_host_criteria(index, token)
        return token, index + 1 >= self._limit or bool(self._finished.all())

    def _queue(self, index: int) -> None:
        """Queue token ``index`` and some after it."""
        if not self._has_memory_for(index):
            # The buffers of drafts may be what the prompt lacks.
            self._request = dataclasses.replace(self._request, draft_tokens=0)
            self._session = None
            self._engine.start_over()
            self._session = self._make_session()
            self._has_memory_for(index)
        if self._session.graphs.capture_failed:
            self._engine.give_up_sessions()

    def _has_memory_for(self, index: int) -> bool:
        """Queue token ``index`` and some after it; tell whether there was memory for it, or not with drafts.

        Raises:
            CannotServe: memory is too short to begin, with or without drafts.
        """
        request, session = self._request, self._session
        try:
            if self._seed is None:
                self._seed = request.seed()
            if index == 0:
                session.begin(self._model, request, self._seed)
            while session.lacks(index, self._limit):
                session.advance(self._model)
            return True
        except BaseException as error:
            # Whatever ended the step half way, even an interrupt: no request may continue from there.
            self._engine.give_up_sessions()
            if index or not is_out_of_memory(error):
                raise
            reclaim(self._model, error)
        if request.draft_tokens:
            return False
        batch, length = request.input_ids.shape
        prompt = f"a prompt of {batch} x {length} tokens"
        raise too_little_for_the_loop(self._model, prompt, batch, length, length + self._limit)

    def _ask_host_criteria(self, index: int, token: torch.Tensor) -> None:
        """Evaluate the criteria that have no kernel on the ids up to token ``index``."""
        request, start = self._request, self._request.input_ids.shape[1]
        answer = self._session.ids(start + index + 1)[:, start:]
        # The device does not know which sequences these criteria ended before.
        answer[:, -1].copy_(token)
        ids = torch.cat((request.input_ids, answer), dim=1)
        self._finished |= request.host_criteria(ids, None).cpu()


def engine_of(model: Any) -> DecodeEngine:
    """Return the model's engine; the first call makes it."""
    return model.__dict__.setdefault("_decode_engine", DecodeEngine())
