"""Turn an int8 or int4 weight into floats, for products with so many rows that a library's is the fastest."""

import torch
import triton
import triton.language as tl

from ..common import pdl_options, wait_for_predecessor
from ..configs import uses_pdl

BLOCK_BYTES = 4096


@triton.jit
def dequantize_kernel(
    weight,  # int8 [N * K * BITS / 8]
    scale,  # [N, K / GROUP]
    out,  # [N, K]
    total,  # bytes of the weight
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + byte, mask=byte < total, other=0, eviction_policy="evict_first").to(tl.int32)
    # Rows are whole groups, so groups count on from row to row.
    s = tl.load(scale + byte * (8 // BITS) // GROUP, mask=byte < total, other=0.0).to(tl.float32)
    if BITS == 4:
        pair = tl.join((w >> 4).to(tl.float32) * s, ((w << 28) >> 28).to(tl.float32) * s)
        column = byte[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out + column, pair, mask=(byte < total)[:, None])
    else:
        tl.store(out + byte, w.to(tl.float32) * s, mask=byte < total)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return integers * scale, each product rounded once to ``dtype``.

    Args:
        weight: int8 [N, K * bits / 8], contiguous, in the stored format. scale: [N] or [N, groups], contiguous.

    Returns:
        [N, K] in ``dtype``.
    """
    n, k = weight.shape[0], weight.shape[1] * 8 // bits
    out = torch.empty(n, k, dtype=dtype, device=weight.device) if out is None else out
    pdl = uses_pdl(weight.device)
    dequantize_kernel[(triton.cdiv(weight.numel(), BLOCK_BYTES),)](
        weight,
        scale,
        out,
        weight.numel(),
        BITS=bits,
        GROUP=n * k // scale.numel(),
        BLOCK=BLOCK_BYTES,
        PDL=pdl,
        num_warps=8,
        **pdl_options(pdl),
    )
    return out
