"""Choose the path of a generation: the captured loop if it can serve the request, else the plain one."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import report
from ..decoding.refusal import CannotServe, check_place
from ..decoding.request import Request
from ..decoding.shortage import memory_explained, memory_returned
from .plain import plain_tokens
from .requests import read_request


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
    """Return what transformers' ``_sample`` returns, with its arguments: int64 [B, prompt + tokens].

    Args:
        plain: transformers' own loop, called without arguments if the captured one cannot serve the request.
    """
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    try:
        return captured_ids(model, *arguments, streamer, model_kwargs)
    except CannotServe as reason:
        report.record_generation("plain", str(reason))
    # transformers' own loop takes no generator.
    if model_kwargs.get("generator") is None:
        return plain()
    return _joined(input_ids, list(plain_tokens(model, *arguments, streamer, model_kwargs)))


def captured_ids(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> torch.Tensor:
    """Return what ``generate_ids`` returns, from the captured loop.

    Raises:
        CannotServe: before the first token: the loop cannot do what the arguments ask; the message says why.
    """
    request = read_request(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
    return _joined(input_ids, list(_captured(model, request, streamer)))


def _joined(input_ids: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:
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
    """Return an iterator over the next tokens, int64 [B] on the CPU each, until every row has ended.

    Arguments are those of transformers' ``_sample``. Rows that ended yield the pad id. Nothing is computed or reserved
    before the first token is asked for.
    """
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    try:
        request = read_request(model, *arguments, model_kwargs)
    except CannotServe as reason:
        # A new one without a traceback, whose frames would keep the model and the cache until a garbage collection.
        request = CannotServe(*reason.args)
    return _returning_memory(_captured_or_plain(model, request, arguments, streamer, model_kwargs))


# Two functions, neither a closure: the frame of a failed function can release its arguments once it has ended, but
# never what it closes over.
def _returning_memory(tokens: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    with memory_returned():
        yield from tokens


def _captured_or_plain(
    model: Any, request: Request | CannotServe, arguments: tuple, streamer: Any, model_kwargs: dict[str, Any]
) -> Iterator[torch.Tensor]:
    input_ids, _, _, generation_config = arguments
    with memory_explained(model, input_ids, generation_config.max_length):
        if isinstance(request, CannotServe):
            # Not raised: it would hold this frame, which holds it.
            report.record_generation("plain", str(request))
        else:
            try:
                yield from _captured(model, request, streamer)
                return
            except CannotServe as reason:
                report.record_generation("plain", str(reason))
        yield from plain_tokens(model, *arguments, streamer, model_kwargs)


def _captured(model: Any, request: Request, streamer: Any) -> Iterator[torch.Tensor]:
    """Yield the tokens of the captured loop, which is imported only if its kernels can be.

    Raises:
        CannotServe: before the first token.
    """
    check_place(model)
    if model.has_own_inputs():
        raise CannotServe(f"{type(model).__name__} has a prepare_inputs_for_generation of its own")
    from ..decoding.loop import captured_tokens

    tokens = captured_tokens(model, request)
    try:
        for index, token in enumerate(tokens):
            if index == 0:
                report.record_generation("captured", "sampling" if request.do_sample else "greedy search")
            if streamer is not None:
                streamer.put(token)
            yield token
    finally:
        # Closed at once, whatever a streamer or the caller does: an open generator holds the model's lock. Python code,
        # as in contextlib.closing, could be interrupted before it closes.
        tokens.close()
    if streamer is not None:
        streamer.end()
