"""fast_gelu(x) * multiplier in one pass."""

import torch
import triton
import triton.language as tl

from .common import gelu, pdl_options, require, wait_for_predecessor
from .configs import uses_pdl

BLOCK = 1024


@triton.jit
def fused_fast_gelu_mul_kernel(
    x,  # [n]
    multiplier,  # [n]
    out,  # [n]
    n,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = tl.load(x + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    factor = tl.load(multiplier + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.store(out + offsets, gelu(value) * factor, mask=offsets < n)


def fused_fast_gelu_mul(x: torch.Tensor, multiplier: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``fast_gelu(x) * multiplier``, computed in float32; both have one shape and dtype.

    Raises:
        ValueError: the shapes differ.
    """
    require(
        x.shape == multiplier.shape,
        f"x is {tuple(x.shape)} but multiplier is {tuple(multiplier.shape)}; pass equal shapes",
    )
    x, multiplier = x.contiguous(), multiplier.contiguous()
    out = torch.empty_like(x) if out is None else out
    pdl = uses_pdl(x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        fused_fast_gelu_mul_kernel[grid](
            x, multiplier, out, x.numel(), BLOCK=BLOCK, PDL=pdl, num_warps=4, **pdl_options(pdl)
        )
    return out
