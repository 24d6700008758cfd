"""Choose the next token of each row, by the rules and with the random numbers of the Triton kernels, and advance it."""

import math
from typing import Any

import numpy as np
import torch

from ...states import DecodeState
from .random import gumbel, uniform

# As in triton/sampling/histogram.py: weights are whole numbers, and the total's rounding asks for no score more.
_ONE = np.float32(1 << 40)
_SLACK = np.float32(1 - 2.0**-21)
# Most scores that are looked at first where top-p alone decides how many remain.
_FIRST = 1024


def greedy_sample(
    scores: torch.Tensor,
    state: DecodeState,
    *,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Any = None,
) -> None:
    """Choose each row's largest score and advance; arguments and meaning are those of ``triton.greedy_sample``."""
    _end(scores, state, scores.argmax(dim=1).tolist(), invalid_token if invalid_rule else None)


def top_k_sample(
    scores: torch.Tensor,
    state: DecodeState,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    capacity: int = 64,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Any = None,
) -> None:
    """Draw each row's next token after temperature, top-k and top-p, and advance.

    Arguments and meaning are those of ``triton.top_k_sample``.
    """
    settings = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    draws = _draws(state)
    tokens = [
        int(scores[row].argmax()) if heat <= 0 else _draw_of_few(scores[row], heat, k, p, capacity, *draws[row])
        for row, (heat, k, p) in zip(range(len(scores)), settings, strict=False)
    ]
    _end(scores, state, tokens, invalid_token if invalid_rule else None)


def full_sample(
    scores: torch.Tensor,
    state: DecodeState,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    *,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Any = None,
) -> None:
    """Draw each row's next token after temperature, top-k and top-p over the whole vocabulary, and advance.

    Arguments and meaning are those of ``triton.full_sample``.
    """
    tokens, draws = [], _draws(state)
    for row in range(len(scores)):
        heat = float(temperature[row])
        if heat <= 0:
            tokens.append(int(scores[row].argmax()))
            continue
        values, index = kept_scores(
            scores[row], heat, None if top_k is None else int(top_k[row]), None if top_p is None else float(top_p[row])
        )
        noisy = values / heat + gumbel(*draws[row], index)
        # Of equal ones the lowest index wins.
        best = index[noisy == noisy.max()] if len(noisy) else index
        tokens.append(int(best.min()) if len(best) else int(scores[row].argmax()))
    _end(scores, state, tokens, invalid_token if invalid_rule else None)


def kept_scores(
    scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of a row that may be drawn, float32 [N], and their indices, int64 [N].

    Args:
        scores: [V]. temperature: above 0. top_k: at least 1, or None. top_p: from 1.0 on it keeps all, or None.
    """
    scores, size = scores.float(), len(scores)
    top_p = None if top_p is None or top_p >= 1 else top_p
    if top_k is None or max(top_k, 1) >= size:
        if top_p is None:
            return scores, torch.arange(size, device="cpu")
        return _nucleus_of_all(scores, temperature, top_p)
    values, index = _best(scores, max(top_k, 1), ties=True)
    if top_p is None:
        return values, index
    weights = _weights(values, temperature)
    return _first(values, index, weights, int(weights.sum()), top_p)


def _nucleus_of_all(scores: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = int(_weights(scores, temperature).sum())
    for count in (_FIRST, len(scores)):
        values, index = _best(scores, min(count, len(scores)), ties=True)
        weights = _weights(values, temperature)
        if int(weights.sum()) >= _target(total, top_p):
            break
    return _first(values, index, weights, total, top_p)


def _first(
    values: torch.Tensor, index: torch.Tensor, weights: np.ndarray, total: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first of the scores, best first, with which their weights reach the share ``top_p`` of the total."""
    count = int((np.cumsum(weights) < _target(total, top_p)).sum()) + 1
    return values[:count], index[:count]


def _target(total: int, top_p: float) -> int:
    return min(max(int(np.float32(top_p) * _SLACK * np.float32(total)), 1), total)


def _weights(scores: torch.Tensor, temperature: float) -> np.ndarray:
    """Return exp((score - the largest) / temperature) of scores [N] in units of 2^-40, int64 [N]; 0 for -inf."""
    scaled = scores / temperature
    highest = scaled.max()
    distance = torch.where(scaled == highest, 0.0, highest - scaled)
    # Rows with NaN are no error here: the rule for those may replace their token.
    return ((-distance).exp().nan_to_num(0.0) * float(_ONE)).long().numpy()


def _best(scores: torch.Tensor, count: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best ``count`` scores of a row, or all that equal the last of them too, and their indices.

    They are in the order of ``triton.common.pack_candidate``: the largest first, of equal ones the lowest index first.
    -inf is none of them unless all are.
    """
    values, index = scores.topk(count)
    least = values[-1]
    if bool(torch.isneginf(least)):
        index = torch.nonzero(~torch.isneginf(scores)).flatten()
    elif int((scores >= least).sum()) > count:
        index = torch.nonzero(scores >= least).flatten()
    index = index.sort().values if len(index) else torch.arange(count, device="cpu")
    values = scores[index]
    order = values.sort(descending=True, stable=True).indices
    order = order if ties else order[:count]
    return values[order], index[order]


def _draw_of_few(
    scores: torch.Tensor, heat: float, top_k: int, top_p: float, capacity: int, seed: int, step: int, lane: int
) -> int:
    """Draw from the best scores of a row, of which at most ``capacity`` are looked at."""
    found, index = _best(scores.float(), min(capacity, len(scores)), ties=False)
    values = found.numpy()
    kth = values[min(max(top_k, 1), len(values)) - 1]
    values = values[: int((values >= kth).sum())]
    scaled = values / np.float32(heat)
    with np.errstate(invalid="ignore"):
        mass = np.where(scaled == scaled[0], np.float32(1), np.exp(scaled - scaled[0]))
    before = (np.cumsum(mass, dtype=np.float32) - mass) / mass.sum(dtype=np.float32)
    limit = math.inf if top_p >= 1 else np.float32(top_p)
    mass = mass[: max(int((before < limit).sum()), 1)]
    reached = np.cumsum(mass, dtype=np.float32)
    chosen = int((reached <= uniform(seed, step, lane) * reached[-1]).sum())
    return int(index[min(chosen, int((mass > 0).sum()) - 1)])


def _draws(state: DecodeState) -> list[tuple[int, int, int]]:
    """Return seed, step and lane of each row."""
    return list(zip(state.seed.tolist(), state.step.tolist(), state.lane.tolist(), strict=True))


def _end(scores: torch.Tensor, state: DecodeState, tokens: list[int], invalid: int | None) -> None:
    """Replace the tokens of rows with NaN or +inf if there is a token for those, and advance all rows."""
    if invalid is not None:
        finite = (scores.amax(dim=1) < math.inf).tolist()
        tokens = [token if is_finite else invalid for token, is_finite in zip(tokens, finite, strict=True)]
    _advance(state, np.array(tokens, dtype=np.int64))


def _advance(state: DecodeState, tokens: np.ndarray) -> None:
    """Record the next token of each row, int64 [B], and advance the rows and the turn."""
    rows = np.arange(len(tokens))
    finished, ids, length, turn = (one.numpy() for one in (state.finished, state.ids, state.ids_length, state.turn))
    tokens = np.where(finished != 0, state.pad_id.numpy(), tokens)
    inside = length < ids.shape[1]
    ids[rows[inside], length[inside]] = tokens[inside]
    state.ring.numpy()[turn[0] % len(state.ring)] = tokens
    finished[(state.eos_ids.numpy() == tokens[:, None]).any(axis=1) | (length + 1 >= state.limit.numpy())] = 1
    state.tokens.numpy()[:] = tokens
    for counter in (length, state.cache_length.numpy(), state.step.numpy(), turn):
        counter += 1
