"""x W^T for an int8 or int4 weight of any shape, any groups, any dtype of x: exact in float32, one row at a time."""

import torch
import triton
import triton.language as tl

from ..common import gelu, pdl_options, wait_for_predecessor
from ..configs import uses_pdl

BLOCK_N, BLOCK_BYTES = 4, 512


@triton.jit
def quantized_gemv_kernel(
    x,  # [M, K]
    weight,  # int8 [N, K * BITS / 8]
    scale,  # [N, GROUPS]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    N,
    beta,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    ROW_BYTES: tl.constexpr = K * BITS // 8
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    wait_for_predecessor(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_BYTES], tl.float32)
    for start in range(0, ROW_BYTES, BLOCK_BYTES):
        byte = start + tl.arange(0, BLOCK_BYTES)
        valid = (row < N)[:, None] & (byte < ROW_BYTES)[None, :]
        w = tl.load(weight + row[:, None].to(tl.int64) * ROW_BYTES + byte[None, :], mask=valid, other=0)
        # For four bits this is the first of the byte's two columns; both have one scale, as groups are even.
        column = byte * (8 // BITS)
        if BITS == 4:
            even = tl.load(x + m * K + column, mask=column < K, other=0.0).to(tl.float32)
            odd = tl.load(x + m * K + column + 1, mask=column < K, other=0.0).to(tl.float32)
            w = w.to(tl.int32)
            product = (w >> 4).to(tl.float32) * even[None, :] + ((w << 28) >> 28).to(tl.float32) * odd[None, :]
        else:
            value = tl.load(x + m * K + column, mask=column < K, other=0.0).to(tl.float32)
            product = w.to(tl.float32) * value[None, :]
        if GROUPS > 1:
            group = (column // (K // GROUPS))[None, :]
            product *= tl.load(scale + row[:, None] * GROUPS + group, mask=valid, other=0.0).to(tl.float32)
        acc += product
    total = tl.sum(acc, 1)
    if GROUPS == 1:
        total *= tl.load(scale + row, mask=row < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    if GELU:
        total = gelu(total)
    if HAS_RESIDUAL:
        total += beta * tl.load(residual + m * N + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + row, total, mask=row < N)


def launch_quantized_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    out: torch.Tensor,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), ``weight`` int8 [N, K * bits / 8], ``scale`` [N] or [N, groups]."""
    rows, k = x.shape
    n = weight.shape[0]
    pdl = uses_pdl(x.device)
    quantized_gemv_kernel[(triton.cdiv(n, BLOCK_N), rows)](
        x,
        weight,
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        n,
        float(beta),
        K=k,
        BITS=bits,
        GROUPS=scale.numel() // n,
        BLOCK_N=BLOCK_N,
        BLOCK_BYTES=BLOCK_BYTES,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )
