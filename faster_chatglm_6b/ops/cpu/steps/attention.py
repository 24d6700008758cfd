"""Attention of one or several new rows of each sequence, with their positions and the append to the cache."""

from typing import Any

import torch

from .kernel import kernel
from .new_rows import Step, run


def decode_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    length: torch.Tensor,
    finished: torch.Tensor,
    first_key: torch.Tensor,
    position: torch.Tensor,
    sop_index: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **hints: Any,
) -> torch.Tensor:
    """Rotate query and key, append to the cache and attend for one decode step.

    Arguments and meaning are those of ``triton.decode_attention``, whose other options decide how a GPU does it.

    Args:
        qkv: [B, 3 * H * K]. out: [B, H * K].
    """
    batch, size = qkv.shape[0], key_cache.shape[1] * key_cache.shape[3]
    out = qkv.new_empty(batch, size) if out is None else out
    numbers = length, finished, first_key, position, sop_index
    caches = key_cache, value_cache
    run(kernel(), Step(qkv[:, None], *caches, *numbers, cos, sin, block_table, None, out[:, None]))
    return out


def draft_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    length: torch.Tensor,
    finished: torch.Tensor,
    first_key: torch.Tensor,
    position: torch.Tensor,
    sop_index: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **hints: Any,
) -> torch.Tensor:
    """Rotate, append and attend for R positions of each sequence, each seeing those before it.

    Arguments and meaning are those of ``triton.draft_attention``, whose other options decide how a GPU does it.

    Args:
        qkv: [B, R, 3 * H * K]. out: [B, R, H * K].
    """
    out = qkv.new_empty(*qkv.shape[:2], key_cache.shape[1] * key_cache.shape[3]) if out is None else out
    numbers = length, finished, first_key, position, sop_index
    run(kernel(), Step(qkv, key_cache, value_cache, *numbers, cos, sin, block_table, limit, out))
    return out
