"""OpenAI's changes of scores on device buffers: biases by id, and penalties by how often an answer has a token."""

import torch
import triton
import triton.language as tl

from ..common import pdl_options, require, wait_for_predecessor
from ..configs import uses_pdl

BLOCK = 128


@triton.jit
def logit_bias_kernel(
    scores,  # float32 [B, V]
    bias_ids,  # int32 [B, N]
    bias_values,  # float32 [B, N]
    vocab,  # V
    count,  # N
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    token = tl.load(bias_ids + row * count + place, mask=place < count, other=-1)
    there = (token >= 0) & (token < vocab)
    value = tl.load(bias_values + row * count + place, mask=there, other=0.0)
    score = tl.load(scores + row * vocab + token, mask=there, other=0.0)
    tl.store(scores + row * vocab + token, score + value, mask=there)


@triton.jit
def token_count_penalty_kernel(
    scores,  # float32 [B, V]
    ids,  # int64 [B, T]
    answer_start,  # int32 [B]
    ids_length,  # int32 [B]
    presence,  # float32 [B]
    frequency,  # float32 [B]
    vocab,  # V
    ids_capacity,  # T
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Serve BLOCK tokens of one answer: the first occurrence of a token counts all of them and writes its score."""
    row = tl.program_id(1).to(tl.int64)
    wait_for_predecessor(PDL)
    per_token, per_count = tl.load(presence + row), tl.load(frequency + row)
    start = tl.load(answer_start + row)
    stop = tl.minimum(tl.load(ids_length + row), ids_capacity)
    place = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    history = ids + row * ids_capacity
    if ((per_token != 0.0) | (per_count != 0.0)) & (start + tl.program_id(0) * BLOCK < stop):
        token = tl.load(history + place, mask=place < stop, other=-1)
        count = tl.zeros([BLOCK], tl.int32)
        earlier = tl.zeros([BLOCK], tl.int32)
        for other_start in range(start, stop, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            same = token[:, None] == tl.load(history + other, mask=other < stop, other=-2)[None, :]
            count += tl.sum(same.to(tl.int32), 1)
            earlier += tl.sum((same & (other[None, :] < place[:, None])).to(tl.int32), 1)
        writes = (token >= 0) & (token < vocab) & (earlier == 0)
        score = tl.load(scores + row * vocab + token, mask=writes, other=0.0)
        tl.store(scores + row * vocab + token, score - (per_token + per_count * count.to(tl.float32)), mask=writes)


def logit_bias(scores: torch.Tensor, bias_ids: torch.Tensor, bias_values: torch.Tensor) -> None:
    """Add a number to the scores of some ids (OpenAI's logit_bias).

    Args:
        scores: float32 [B, V].
        bias_ids: int32 [B or more, N], different ids of a row; negative ones stand for no bias.
        bias_values: float32 [B or more, N].

    Raises:
        ValueError: a shape does not fit.
    """
    _check(scores, bias_ids, bias_values)
    count, pdl = bias_ids.shape[1], uses_pdl(scores.device)
    logit_bias_kernel[(triton.cdiv(count, BLOCK), scores.shape[0])](
        scores, bias_ids, bias_values, scores.shape[1], count, BLOCK=BLOCK, PDL=pdl, num_warps=4, **pdl_options(pdl)
    )


def token_count_penalty(
    scores: torch.Tensor,
    ids: torch.Tensor,
    answer_start: torch.Tensor,
    ids_length: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Subtract presence + frequency * n from the score of a token that an answer has n > 0 times (OpenAI's penalties).

    Args:
        scores: float32 [B, V].
        ids: int64 [B, T]; the answer of a row is its ids from ``answer_start`` up to ``ids_length``, int32 [B].
        presence, frequency: float32 [B]; rows of zeros cost nothing.

    Raises:
        ValueError: a shape does not fit.
    """
    _check(scores, ids)
    pdl = uses_pdl(scores.device)
    token_count_penalty_kernel[(triton.cdiv(ids.shape[1], BLOCK), scores.shape[0])](
        scores,
        ids,
        answer_start,
        ids_length,
        presence,
        frequency,
        scores.shape[1],
        ids.shape[1],
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )


def _check(scores: torch.Tensor, *tables: torch.Tensor) -> None:
    require(scores.dtype == torch.float32, f"scores is {scores.dtype}; it must be float32")
    for table in tables:
        require(
            table.shape[0] >= scores.shape[0] and table.is_contiguous(),
            f"scores has {scores.shape[0]} rows, but a table beside it is {tuple(table.shape)}; pass a row for each",
        )
