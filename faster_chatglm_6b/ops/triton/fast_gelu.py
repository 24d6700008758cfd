"""tanh GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016)."""

import torch
import triton
import triton.language as tl

from .common import gelu, pdl_options, wait_for_predecessor
from .configs import uses_pdl

BLOCK = 1024


@triton.jit
def fast_gelu_kernel(
    x,  # [n]
    out,  # [n]
    n,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = tl.load(x + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.store(out + offsets, gelu(value), mask=offsets < n)


def fast_gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return tanh GELU of x (any shape; float16, bfloat16 or float32), computed in float32."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    pdl = uses_pdl(x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        fast_gelu_kernel[grid](x, out, x.numel(), BLOCK=BLOCK, PDL=pdl, num_warps=4, **pdl_options(pdl))
    return out
