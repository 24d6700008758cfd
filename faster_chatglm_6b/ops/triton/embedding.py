"""Rows of the embedding table, one for each token."""

import torch
import triton
import triton.language as tl

from .common import pdl_options, wait_for_predecessor
from .configs import uses_pdl

BLOCK = 1024


@triton.jit
def embedding_kernel(
    tokens,  # int64 or int32 [B]
    weight,  # [V, D]
    out,  # [B, D]
    size,  # D
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    token = tl.maximum(tl.load(tokens + row).to(tl.int64), 0)
    value = tl.load(weight + token * size + columns, mask=columns < size)
    tl.store(out + row * size + columns, value, mask=columns < size)


def embedding(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Look up ``weight[tokens]``.

    Args:
        tokens: int64 or int32 [B], each below V, which is not checked; negative ones count as 0.
        weight: [V, D].
        out: [B, D].
    """
    size = weight.shape[1]
    out = weight.new_empty(tokens.shape[0], size) if out is None else out
    pdl = uses_pdl(weight.device)
    # Only the first axis of a grid takes more than 65535, which the tokens of many long prompts are.
    grid = (tokens.shape[0], triton.cdiv(size, BLOCK))
    embedding_kernel[grid](tokens, weight, out, size, BLOCK=BLOCK, PDL=pdl, num_warps=4, **pdl_options(pdl))
    return out
