"""LayerNorm(x + alpha * skip) (Ba et al. 2016), one program per row."""

import torch
import triton
import triton.language as tl

from .common import pdl_options, require, start_successor, wait_for_predecessor
from .configs import uses_pdl


@triton.jit
def normalise_row(x, gamma, beta, columns, size, epsilon):
    """Return (x - mean) / sqrt(variance + epsilon) * gamma + beta in float32 over one row's ``size`` valid columns."""
    valid = columns < size
    mean = tl.sum(tl.where(valid, x, 0.0), axis=0) / size
    centred = tl.where(valid, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / size
    return centred * tl.rsqrt(variance + epsilon) * gamma + beta


@triton.jit
def skip_layer_norm_kernel(
    x,  # [rows, size]
    skip,  # [rows, size]
    gamma,  # [size]
    beta,  # [size]
    out,  # [rows, size]
    size,
    epsilon,
    alpha,
    BLOCK: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PDL: tl.constexpr,
):
    start_successor(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    valid = columns < size
    scale = tl.load(gamma + columns, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(beta + columns, mask=valid, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = tl.load(x + row * size + columns, mask=valid, other=0.0).to(tl.float32)
    if HAS_SKIP:
        value += alpha * tl.load(skip + row * size + columns, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, normalise_row(value, scale, shift, columns, size, epsilon), mask=valid)


def skip_layer_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    skip: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return LayerNorm(x + alpha * skip) over the last axis, sum and statistics in float32.

    Args:
        x, skip: [..., size]. gamma, beta: [size].

    Raises:
        ValueError: a shape does not fit x.
    """
    size = x.shape[-1]
    require(
        gamma.shape == beta.shape == (size,),
        f"x is {tuple(x.shape)}: gamma and beta must be [{size}], not {tuple(gamma.shape)} and {tuple(beta.shape)}",
    )
    x = x.contiguous()
    if skip is not None:
        require(skip.shape == x.shape, f"skip is {tuple(skip.shape)} but x is {tuple(x.shape)}; pass equal shapes")
        skip = skip.contiguous()
    out = torch.empty_like(x) if out is None else out
    pdl = uses_pdl(x.device)
    block = triton.next_power_of_2(size)
    if x.numel():
        skip_layer_norm_kernel[(x.numel() // size,)](
            x,
            x if skip is None else skip,
            gamma,
            beta,
            out,
            size,
            epsilon,
            alpha,
            BLOCK=block,
            HAS_SKIP=skip is not None,
            PDL=pdl,
            num_warps=min(max(block // 512, 1), 16),
            **pdl_options(pdl),
        )
    return out
