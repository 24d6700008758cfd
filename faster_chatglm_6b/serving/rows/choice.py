"""Choose the next token of one row from its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .interface import Logprobs, RowRequest

# Below it the most likely token is certain, and scores would leave the range of floats.
LOWEST_TEMPERATURE = 1e-5


def choose(logits: torch.Tensor, request: RowRequest, answer: Sequence[int]) -> tuple[int, Logprobs | None]:
    """Return the next token, and its log-probabilities if they are asked for.

    Scores change in the order bias, minimum length, penalties, temperature, top-k, top-p.

    Args:
        logits: float [V].
        request: what the row was asked for.
        answer: the tokens of the answer so far.

    Raises:
        ArithmeticError: a score is NaN or infinite.
    """
    scores = logits.to(copy=True, dtype=torch.float32)
    if not bool(torch.isfinite(scores).all()):
        raise scores_not_finite()
    raw = scores.clone() if request.top_logprobs is not None else None
    _bias(scores, request, answer)
    if request.temperature < LOWEST_TEMPERATURE:
        token = int(scores.argmax())
    else:
        token = _draw(scores / request.temperature, request, uniform(request.seed, len(answer)))
    return token, None if raw is None else _logprobs(raw, token, request.top_logprobs)


def scores_not_finite() -> ArithmeticError:
    """Return the error of a row whose scores hold NaN or infinity."""
    return ArithmeticError(
        "The model's scores are not finite, so that no token can be chosen; load it in a dtype of wider range."
    )


def uniform(seed: int, index: int) -> float:
    """Return the random number in [0, 1) that belongs to a seed and to a token's index in the answer."""
    return float(np.random.Generator(np.random.Philox(key=seed % 2**64, counter=index)).random())


def _bias(scores: torch.Tensor, request: RowRequest, answer: Sequence[int]) -> None:
    if request.logit_bias:
        scores.index_add_(0, *_bias_tensors(request.logit_bias, scores.device))
    if len(answer) < request.min_tokens and request.end_ids:
        scores[list(request.end_ids)] = torch.finfo(scores.dtype).min
    if request.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.ids, *answer}), device=scores.device)
        known = scores[seen]
        scores[seen] = torch.where(known < 0, known * request.repetition_penalty, known / request.repetition_penalty)
    if answer and (request.presence_penalty or request.frequency_penalty):
        counts = Counter(answer)
        ids = torch.tensor([*counts], device=scores.device)
        often = torch.tensor([*counts.values()], dtype=scores.dtype, device=scores.device)
        scores[ids] -= request.presence_penalty + request.frequency_penalty * often


@lru_cache(maxsize=512)
def _bias_tensors(biases: tuple[tuple[int, float], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and what is added to their scores. They are kept: each token of a row asks for the same."""
    ids, values = zip(*biases, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device)


def _draw(scores: torch.Tensor, request: RowRequest, number: float) -> int:
    """Draw one of the candidates: the first at which the summed probabilities exceed ``number`` of them all."""
    size = scores.shape[0]
    values, ids = scores.topk(min(request.top_k, size)) if request.top_k else scores.sort(descending=True, stable=True)
    probabilities = torch.softmax(values.double().cpu(), dim=0)
    reached = probabilities.cumsum(dim=0)
    # A candidate stays if those before it do not reach top_p; so the first one always does.
    kept = int((reached - probabilities < request.top_p).sum())
    reached = reached[: max(kept, 1)]
    place = int(torch.searchsorted(reached, number * float(reached[-1]), right=True))
    return int(ids[min(place, len(reached) - 1)])


def _logprobs(scores: torch.Tensor, token: int, count: int) -> Logprobs:
    every = torch.log_softmax(scores, dim=0)
    values, ids = every.topk(min(count, every.shape[0]))
    return Logprobs(float(every[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
