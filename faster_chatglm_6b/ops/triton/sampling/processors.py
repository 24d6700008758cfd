"""transformers' logits processors on device buffers; each is one small launch on float32 scores [B, V]."""

import torch
import triton
import triton.language as tl

from ..common import pdl_options, require, wait_for_predecessor
from ..configs import uses_pdl

BLOCK = 1024


@triton.jit
def copy_scores_kernel(
    logits,  # [n]
    scores,  # float32 [n]
    n,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    tl.store(scores + index, tl.load(logits + index, mask=index < n).to(tl.float32), mask=index < n)


@triton.jit
def repetition_penalty_kernel(
    logits,  # [B, V]
    scores,  # float32 [B, V]
    ids,  # int64 [B, T]
    ids_length,  # int32 [B]
    penalty,  # float32 [B]
    vocab,  # V
    ids_capacity,  # T
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    seen = place < tl.minimum(tl.load(ids_length + row), ids_capacity)
    token = tl.load(ids + row * ids_capacity + place, mask=seen, other=0)
    # Read from the untouched logits, so that a token that occurs twice is penalised once.
    value = tl.load(logits + row * vocab + token, mask=seen, other=0.0).to(tl.float32)
    factor = tl.load(penalty + row)
    tl.store(scores + row * vocab + token, tl.where(value < 0.0, value * factor, value / factor), mask=seen)


@triton.jit
def no_repeat_ngram_kernel(
    scores,  # float32 [B, V]
    ids,  # int64 [B, T]
    ids_length,  # int32 [B]
    ngram_size,  # int32 [B]
    vocab,  # V
    ids_capacity,  # T
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    length = tl.minimum(tl.load(ids_length + row), ids_capacity)
    size = tl.load(ngram_size + row)
    history = ids + row * ids_capacity
    equal = (size > 0) & (start + size <= length)
    for offset in range(0, size - 1):
        newest = tl.load(history + tl.maximum(length - size + 1 + offset, 0))
        equal = equal & (tl.load(history + start + offset, mask=equal, other=-1) == newest)
    banned = tl.load(history + start + size - 1, mask=equal, other=0)
    tl.store(scores + row * vocab + banned, float("-inf"), mask=equal)


@triton.jit
def min_length_kernel(
    scores,  # float32 [B, V]
    ids_length,  # int32 [B]
    minimum,  # int32 [B]
    eos_ids,  # int64 [B, E]
    vocab,  # V
    eos_count,  # E
    EOS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, EOS_BLOCK)
    wait_for_predecessor(PDL)
    token = tl.load(eos_ids + row * eos_count + entry, mask=entry < eos_count, other=-1)
    is_short = tl.load(ids_length + row) < tl.load(minimum + row)
    # To Triton 3.9's interpreter a broadcast scalar is an integer: the comparison makes the mask one again.
    banned = ((token >= 0) & (token < vocab) & is_short) != 0
    tl.store(scores + row * vocab + token, float("-inf"), mask=banned)


def copy_scores(logits: torch.Tensor, scores: torch.Tensor) -> None:
    """Copy logits to scores as float32, both [B, V]; the processors below change this copy."""
    require(
        scores.shape == logits.shape and scores.dtype == torch.float32,
        f"scores is {scores.dtype} {tuple(scores.shape)}; it must be float32 {tuple(logits.shape)}",
    )
    pdl = uses_pdl(logits.device)
    grid = (triton.cdiv(logits.numel(), BLOCK),)
    copy_scores_kernel[grid](logits, scores, logits.numel(), BLOCK=BLOCK, PDL=pdl, num_warps=4, **pdl_options(pdl))


def repetition_penalty(
    logits: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    ids_length: torch.Tensor,
    penalty: torch.Tensor,
) -> None:
    """Write logit * penalty (negative) or / penalty to scores at every id so far (RepetitionPenaltyLogitsProcessor).

    It must be the first processor, since it starts from the logits again.

    Args:
        logits: [B, V], not changed. scores: float32 [B, V]. ids: int64 [B, T], padding included. ids_length: int32 [B].
        penalty: float32 [B], above 0; 1 changes nothing.
    """
    pdl = uses_pdl(scores.device)
    repetition_penalty_kernel[(triton.cdiv(ids.shape[1], BLOCK), ids.shape[0])](
        logits,
        scores,
        ids,
        ids_length,
        penalty,
        scores.shape[1],
        ids.shape[1],
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )


def no_repeat_ngram(
    scores: torch.Tensor, ids: torch.Tensor, ids_length: torch.Tensor, ngram_size: torch.Tensor
) -> None:
    """Write -inf for every token that would complete an n-gram already in ids (NoRepeatNGramLogitsProcessor).

    Args:
        scores: float32 [B, V]. ids: int64 [B, T]. ids_length: int32 [B]. ngram_size: int32 [B]; 0 bans
            nothing.
    """
    pdl = uses_pdl(scores.device)
    no_repeat_ngram_kernel[(triton.cdiv(ids.shape[1], BLOCK), ids.shape[0])](
        scores,
        ids,
        ids_length,
        ngram_size,
        scores.shape[1],
        ids.shape[1],
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )


def min_length(scores: torch.Tensor, ids_length: torch.Tensor, minimum: torch.Tensor, eos_ids: torch.Tensor) -> None:
    """Write -inf at the end tokens while fewer than ``minimum`` ids exist (MinLength, MinNewTokensLength processors).

    Args:
        scores: float32 [B, V]. ids_length, minimum: int32 [B]. eos_ids: int64 [B, E], -1 entries match nothing.
    """
    pdl = uses_pdl(scores.device)
    min_length_kernel[(scores.shape[0],)](
        scores,
        ids_length,
        minimum,
        eos_ids,
        scores.shape[1],
        eos_ids.shape[1],
        EOS_BLOCK=triton.next_power_of_2(eos_ids.shape[1]),
        PDL=pdl,
        num_warps=1,
        **pdl_options(pdl),
    )
