"""Rotary positions of query or key, straight from the packed per-head [q k v] projection (RoFormer, Su et al. 2021)."""

import torch
import triton
import triton.language as tl

from .common import pdl_options, require, wait_for_predecessor
from .configs import uses_pdl


@triton.jit
def load_head(source, columns, valid, WIDTH: tl.constexpr):
    """Load one head as float32 from ``source`` (pointer to its K values), and for each value its partner.

    Column i turns with column i + WIDTH / 2 of its block of WIDTH columns; the partners of the first half are negated.
    """
    HALF: tl.constexpr = WIDTH // 2
    leading = columns % WIDTH < HALF
    own = tl.load(source + columns, mask=valid, other=0.0).to(tl.float32)
    partner = tl.load(source + tl.where(leading, columns + HALF, columns - HALF), mask=valid, other=0.0).to(tl.float32)
    return own, tl.where(leading, -partner, partner)


@triton.jit
def load_angles(cos, sin, first_position, second_position, columns, valid, WIDTH: tl.constexpr):
    """Load cos and sin per column: the first WIDTH columns by ``first_position``, later ones by ``second_position``.

    The tables are [P, WIDTH / 2].
    """
    HALF: tl.constexpr = WIDTH // 2
    entry = tl.where(columns < WIDTH, first_position, second_position) * HALF + columns % HALF
    c = tl.load(cos + entry, mask=valid, other=0.0).to(tl.float32)
    return c, tl.load(sin + entry, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def fused_apply_rotary_emb_kernel(
    x,  # [B, M, H, 3, K]
    position_ids,  # int64 [B, 2, M] or [B, M]
    cos,  # [P, WIDTH / 2]
    sin,  # [P, WIDTH / 2]
    out,  # [B, H, M, K]
    rows,  # M
    heads,  # H
    TENSOR_INDEX: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, BLOCK_K)
    valid = columns < K
    wait_for_predecessor(PDL)
    if WIDTH < K:
        first_position = tl.load(position_ids + (batch * 2) * rows + row)
        second_position = tl.load(position_ids + (batch * 2 + 1) * rows + row)
    else:
        first_position = tl.load(position_ids + batch * rows + row)
        second_position = first_position
    source = x + (((batch.to(tl.int64) * rows + row) * heads + head) * 3 + TENSOR_INDEX) * K
    own, partner = load_head(source, columns, valid, WIDTH)
    c, s = load_angles(cos, sin, first_position, second_position, columns, valid, WIDTH)
    tl.store(out + ((batch.to(tl.int64) * heads + head) * rows + row) * K + columns, own * c + partner * s, mask=valid)


def require_tables(cos: torch.Tensor, sin: torch.Tensor, size: int) -> None:
    """Raise ValueError unless the tables fit heads of ``size`` values that turn in two halves or as a whole."""
    require(
        cos.shape == sin.shape and cos.shape[1] in (size // 4, size // 2),
        f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}: both must be [P, {size // 4}] or [P, {size // 2}]",
    )


def fused_apply_rotary_emb(
    x: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    tensor_index: int,
    k_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate the query (0) or the key (1) of a packed projection; the products are formed in float32.

    Args:
        x: [B, M, H * 3 * K], layout "BM(H3K)".
        position_ids: int64 [B, 2, M] (the first half of a head turns by [:, 0], the second by [:, 1]) or [B, M].
        cos, sin: [P, K / 4] for [B, 2, M] positions, [P, K / 2] for [B, M].
        tensor_index: 0 for the query, 1 for the key. k_size: K.

    Returns:
        [B, H, M, K], layout "BHMK".

    Raises:
        ValueError: a shape does not fit.
    """
    batch, rows, packed = x.shape
    width = k_size if position_ids.dim() == 2 else k_size // 2
    require(packed % (3 * k_size) == 0, f"x is {tuple(x.shape)}: its last axis must be a multiple of 3 * {k_size}")
    require(
        cos.shape == sin.shape and cos.shape[1] * 2 == width,
        f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}: both must be [positions, {width // 2}]",
    )
    heads = packed // (3 * k_size)
    x, position_ids = x.contiguous(), position_ids.contiguous()
    out = x.new_empty(batch, heads, rows, k_size) if out is None else out
    pdl = uses_pdl(x.device)
    if x.numel():
        fused_apply_rotary_emb_kernel[(rows, heads, batch)](
            x,
            position_ids,
            cos,
            sin,
            out,
            rows,
            heads,
            TENSOR_INDEX=tensor_index,
            K=k_size,
            BLOCK_K=triton.next_power_of_2(k_size),
            WIDTH=width,
            PDL=pdl,
            num_warps=1,
            **pdl_options(pdl),
        )
    return out
