"""One token after the other: prefill, decode, stop, stream."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import report
from ..generation.plain import plain_tokens
from .engine import DecodeEngine
from .memory import is_out_of_memory, memory_explained, memory_returned, reclaim, too_little_for_the_loop
from .refusal import check_model
from .request import Request
from .sampler import CannotServe
from .session import LOOKAHEAD


def captured_tokens(model: Any, request: Request | str, streamer: Any = None) -> Iterator[torch.Tensor]:
    """Yield the next tokens, int64 [B] on the CPU, the pad id for sequences that ended before.

    It waits for the requests of other threads first, and lets go of the model at its end, however that comes.

    Args:
        request: what to serve, or why it cannot be.

    Raises:
        CannotServe: before the first token: the request, or the model, is none for the captured loop, the model is in
        use by this very thread, or there is not enough memory.
    """
    if isinstance(request, str):
        raise CannotServe(request)
    engine = engine_of(model)
    engine.refuse_own_thread()
    with engine.lock:
        try:
            engine.touch()
            run = CapturedRun(model, request, engine)
            for index in itertools.count():
                token, is_last = run.next(index)
                if index == 0:
                    report.record_generation("captured", "sampling" if request.do_sample else "greedy search")
                if streamer is not None:
                    streamer.put(token)
                yield token
                if is_last:
                    break
            if streamer is not None:
                streamer.end()
        finally:
            engine.end()


class CapturedRun:
    """One request on the model's engine, whose lock the caller holds.

    Raises:
        CannotServe: the model cannot be run by the captured loop, or lacks memory.
    """

    def __init__(self, model: Any, request: Request, engine: DecodeEngine):
        self._model, self._request, self._engine = model, request, engine
        batch, length = request.input_ids.shape
        self._limit = max(request.max_length - length, 1)
        self._finished = torch.zeros(batch, dtype=torch.bool)
        self._eos_ids = torch.tensor(request.eos_ids, dtype=torch.int64)
        # Checked with the engine in hand: nobody else generates now, who could be the one to change the model.
        key = check_model(model)
        with self._on_device():
            keys = (model.config.pre_seq_len or 0) + length + self._limit
            self._session = engine.session(model, key, batch, keys)

    def _on_device(self) -> contextlib.AbstractContextManager:
        device = self._model.lm_head.weight.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    # Entered anew for each token: a generator that held it over a yield would switch the caller's autograd off.
    @torch.no_grad()
    def next(self, index: int) -> tuple[torch.Tensor, bool]:
        """Token ``index`` and whether it is the last. Later ones are queued first, so that the device never waits.

        Raises:
            CannotServe: there is not enough memory to begin.
        """
        self._engine.touch()
        request, session = self._request, self._session
        with self._on_device():
            self._queue(index)
            token = session.read(index)
            if request.has_end:
                token = token.masked_fill(self._finished, request.pad_id)
            self._finished |= torch.isin(token, self._eos_ids)
            if len(request.others):
                self._ask_others(index, token)
        return token, index + 1 >= self._limit or bool(self._finished.all())

    def _queue(self, index: int) -> None:
        """Queue token ``index`` and some of those behind it."""
        request, session = self._request, self._session
        try:
            if index == 0:
                session.begin(self._model, request, request.seed())
            while session.launched < min(index + 1 + LOOKAHEAD, self._limit):
                session.advance(self._model)
        except BaseException as error:
            # Whatever came in between, an interrupt perhaps: nobody goes on with half a step.
            self._engine.give_up_sessions()
            if index or not is_out_of_memory(error):
                raise
            reclaim(self._model, error)
            batch, length = request.input_ids.shape
            prompt = f"a prompt of {batch} x {length} tokens"
            raise too_little_for_the_loop(self._model, prompt, batch, length, length + self._limit) from None
        if session.capture_failed:
            self._engine.give_up_sessions()

    def _ask_others(self, index: int, token: torch.Tensor) -> None:
        """Evaluate the criteria that have no kernel on the ids up to token ``index``."""
        request, start = self._request, self._request.input_ids.shape[1]
        answer = self._session.ids(start + index + 1)[:, start:]
        # The device does not know of sequences that these criteria ended before.
        answer[:, -1].copy_(token)
        ids = torch.cat((request.input_ids, answer), dim=1)
        self._finished |= request.others(ids, None).cpu()


def engine_of(model: Any) -> DecodeEngine:
    """What the model keeps for the captured loop; made at the first call."""
    return model.__dict__.setdefault("_decode_engine", DecodeEngine())


def _request_or_reason(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Request | str:
    try:
        return Request.of(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    except CannotServe as reason:
        return str(reason)


def generate_ids(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
    plain: Callable[[], Any],
) -> Any:
    """What transformers' ``_sample`` returns, with its arguments: int64 [B, prompt + tokens] on input_ids' device.

    Args:
        plain: transformers' own loop, called with nothing where the captured one cannot serve the request.
    """
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    try:
        tokens = list(captured_tokens(model, _request_or_reason(model, *arguments, model_kwargs), streamer))
    except CannotServe as reason:
        report.record_generation("plain", str(reason))
        tokens = None
    if tokens is None:
        # transformers' loop knows no generator.
        if model_kwargs.get("generator") is None:
            return plain()
        tokens = list(plain_tokens(model, *arguments, streamer, model_kwargs))
    return torch.cat((input_ids, torch.stack(tokens, dim=1).to(input_ids.device)), dim=1)


def generate_tokens(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Iterator[torch.Tensor]:
    """An iterator over the next tokens, int64 [B] on the CPU each, until every row has ended.

    Arguments are those of transformers' ``_sample``. Rows that ended yield the pad id. Nothing is computed, and the
    model not reserved, before the first token is asked for.
    """
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    request = _request_or_reason(model, *arguments, model_kwargs)
    return _returning_memory(_captured_or_plain(model, request, arguments, streamer, model_kwargs))


# Two functions, and neither inside another one: the frame of one that failed can let go of what it was called with, but
# not while it runs, and never of a closure.
def _returning_memory(tokens: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    with memory_returned():
        yield from tokens


def _captured_or_plain(
    model: Any, request: Request | str, arguments: tuple, streamer: Any, model_kwargs: dict[str, Any]
) -> Iterator[torch.Tensor]:
    input_ids, _, _, generation_config = arguments
    with memory_explained(model, input_ids, generation_config):
        try:
            yield from captured_tokens(model, request, streamer)
            return
        except CannotServe as reason:
            report.record_generation("plain", str(reason))
        yield from plain_tokens(model, *arguments, streamer, model_kwargs)
