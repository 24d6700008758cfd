"""x W^T for one to four rows of x: reading the weight once, in large blocks, is all that costs time."""

import torch
import triton
import triton.language as tl

from ..common import gelu, multiprocessor_count, pdl_options, start_successor, wait_for_predecessor
from ..configs import Gemv, uses_pdl
from ..skip_layer_norm import normalise_row


@triton.jit
def load_weight(weight, row, column, N, K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """Load a block of the weight [N, K]; every value is used once per token, so it leaves the cache first."""
    pointers = weight + row[:, None].to(tl.int64) * K + column[None, :]
    if EVEN_N and EVEN_K:
        block = tl.load(pointers, eviction_policy="evict_first")
    else:
        valid = (row < N)[:, None] & (column < K)[None, :]
        block = tl.load(pointers, mask=valid, other=0.0, eviction_policy="evict_first")
    return block


@triton.jit
def load_x(x, column, K: tl.constexpr, EVEN_K: tl.constexpr):
    if EVEN_K:
        block = tl.load(x + column)
    else:
        block = tl.load(x + column, mask=column < K, other=0.0)
    return block.to(tl.float32)[None, :]


@triton.jit
def load_residual(residual, m, row, N, beta, HAS_RESIDUAL: tl.constexpr):
    """Load beta * residual, or 0 without one; call it along with the loads of x, so that they overlap."""
    if HAS_RESIDUAL:
        addend = beta * tl.load(residual + m * N + row, mask=row < N, other=0.0).to(tl.float32)
    else:
        addend = tl.zeros_like(row).to(tl.float32)
    return addend


@triton.jit
def finish_row(total, m, row, bias_value, addend, out, N, GELU: tl.constexpr):
    """Add the bias, apply GELU, add ``addend`` and store."""
    total += bias_value
    if GELU:
        total = gelu(total)
    total += addend
    tl.store(out + m * N + row, total, mask=row < N)


@triton.jit
def gemv_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    N,
    beta,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    start_successor(PDL)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    # The weight does not depend on the predecessor: the first block is on its way before the wait.
    w = load_weight(weight, row, column, N, K, EVEN_N, EVEN_K)
    bias_value = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias_value = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    addend0 = load_residual(residual, 0, row, N, beta, HAS_RESIDUAL)
    if M > 1:
        addend1 = load_residual(residual, 1, row, N, beta, HAS_RESIDUAL)
    if M > 2:
        addend2 = load_residual(residual, 2, row, N, beta, HAS_RESIDUAL)
    if M > 3:
        addend3 = load_residual(residual, 3, row, N, beta, HAS_RESIDUAL)
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for start in range(0, K, BLOCK_K):
        w32 = w.to(tl.float32)
        acc0 += w32 * load_x(x, start + column, K, EVEN_K)
        if M > 1:
            acc1 += w32 * load_x(x + K, start + column, K, EVEN_K)
        if M > 2:
            acc2 += w32 * load_x(x + 2 * K, start + column, K, EVEN_K)
        if M > 3:
            acc3 += w32 * load_x(x + 3 * K, start + column, K, EVEN_K)
        if start + BLOCK_K < K:
            w = load_weight(weight, row, start + BLOCK_K + column, N, K, EVEN_N, EVEN_K)
    finish_row(tl.sum(acc0, 1), 0, row, bias_value, addend0, out, N, GELU)
    if M > 1:
        finish_row(tl.sum(acc1, 1), 1, row, bias_value, addend1, out, N, GELU)
    if M > 2:
        finish_row(tl.sum(acc2, 1), 2, row, bias_value, addend2, out, N, GELU)
    if M > 3:
        finish_row(tl.sum(acc3, 1), 3, row, bias_value, addend3, out, N, GELU)


@triton.jit
def persistent_gemv_kernel(
    x,  # [K]
    gamma,  # [K]
    shift,  # [K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [N]
    normed,  # [K]
    out,  # [N]
    N,
    beta,
    epsilon,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute a GEMV whose programs own many row blocks: x (BLOCK_K >= K) is read, and normalised, once per program."""
    start_successor(PDL)
    EVEN_K: tl.constexpr = K == BLOCK_K
    column = tl.arange(0, BLOCK_K)
    tile = tl.program_id(0)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w = load_weight(weight, row, column, N, K, EVEN_N, EVEN_K)
    if NORM:
        g = tl.load(gamma + column, mask=column < K, other=0.0).to(tl.float32)
        s = tl.load(shift + column, mask=column < K, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    x_row = tl.load(x + column, mask=column < K, other=0.0)
    if NORM:
        x_row = normalise_row(x_row.to(tl.float32), g, s, column, K, epsilon).to(x.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(normed + column, x_row, mask=column < K)
    for current in range(tile, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        product = w.to(tl.float32) * x_row.to(tl.float32)[None, :]
        next_row = (current + tl.num_programs(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Always masked: the block after the last one does not exist.
        w = load_weight(weight, next_row, column, N, K, False, EVEN_K)
        row = current * BLOCK_N + tl.arange(0, BLOCK_N)
        bias_value = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            bias_value = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        addend = load_residual(residual, 0, row, N, beta, HAS_RESIDUAL)
        finish_row(tl.sum(product, 1), 0, row, bias_value, addend, out, N, GELU)


def launch_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    out: torch.Tensor,
    config: Gemv,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] weight [N, K]^T), 1 <= M <= 4; all contiguous.

    Looping grids serve M = 1 only.
    """
    rows, k = x.shape
    n = weight.shape[0]
    if rows == 1 and config.waves and config.block_k >= k:
        launch_persistent_gemv(x, None, None, 0.0, weight, bias, residual, beta, gelu_epilogue, None, out, config)
        return
    pdl = uses_pdl(x.device)
    gemv_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        out,
        n,
        beta,
        K=k,
        M=rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_N=n % config.block_n == 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )


def launch_persistent_gemv(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    shift: torch.Tensor | None,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    normed: torch.Tensor | None,
    out: torch.Tensor,
    config: Gemv,
) -> None:
    """Compute out [1, N] = epilogue(LayerNorm(x [1, K]) weight [N, K]^T); without gamma x is not normalised."""
    k = x.shape[-1]
    n = weight.shape[0]
    pdl = uses_pdl(x.device)
    blocks = triton.cdiv(n, config.block_n)
    persistent_gemv_kernel[(min(blocks, multiprocessor_count(x.device) * max(config.waves, 1)),)](
        x,
        x if gamma is None else gamma,
        x if shift is None else shift,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        out if normed is None else normed,
        out,
        n,
        beta,
        epsilon,
        K=k,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_N=n % config.block_n == 0,
        NORM=gamma is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )
