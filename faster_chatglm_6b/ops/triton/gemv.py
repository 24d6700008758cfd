"""x W^T for one to four rows of x: the weight is read once, in large blocks, and nothing else costs time."""

import torch
import triton
import triton.language as tl

from .common import gelu, multiprocessor_count, pdl_options, prefetch_to_l2, wait_for_predecessor
from .configs import Gemv, uses_pdl
from .skip_layer_norm import normalise_row

WARPS_PER_MULTIPROCESSOR = 64


@triton.jit
def load_weight(weight, row, column, N, K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """A block of the weight [N, K]; every value is used once per token, so it leaves the cache first."""
    pointers = weight + row[:, None].to(tl.int64) * K + column[None, :]
    if EVEN_N and EVEN_K:
        block = tl.load(pointers, eviction_policy="evict_first")
    else:
        valid = (row < N)[:, None] & (column < K)[None, :]
        block = tl.load(pointers, mask=valid, other=0.0, eviction_policy="evict_first")
    return block


@triton.jit
def prefetch_weight(weight, row, N, first: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Ask for COLUMNS columns of the weight from column ``first`` on; past the end the last line again."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(first + tl.arange(0, COLUMNS // LINE) * LINE, K - 1)
    prefetch_to_l2(weight + tl.minimum(row, N - 1)[:, None].to(tl.int64) * K + column[None, :])


@triton.jit
def load_x(x, column, K: tl.constexpr, EVEN_K: tl.constexpr):
    if EVEN_K:
        block = tl.load(x + column)
    else:
        block = tl.load(x + column, mask=column < K, other=0.0)
    return block.to(tl.float32)[None, :]


@triton.jit
def finish_row(total, m, row, bias_value, residual, out, N, beta, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr):
    """Epilogue: + bias, then GELU or + beta * residual, then store."""
    total += bias_value
    if GELU:
        total = gelu(total)
    if HAS_RESIDUAL:
        total += beta * tl.load(residual + m * N + row, mask=row < N, other=0.0).to(tl.float32)
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
    wave,  # programs that run at the same time, about
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    # The weight does not depend on the predecessor: the first block is on its way before the wait.
    w = load_weight(weight, row, column, N, K, EVEN_N, EVEN_K)
    bias_value = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias_value = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    if PDL:
        if PREFETCH > 0:
            prefetch_weight(weight, row, N, BLOCK_K, K, PREFETCH)
        if AHEAD > 0:
            if tl.program_id(0) < wave:
                for turn in tl.static_range(1, AHEAD + 1):
                    prefetch_weight(weight, row + turn * wave * BLOCK_N, N, 0, K, BLOCK_K)
    wait_for_predecessor(PDL)
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
    finish_row(tl.sum(acc0, 1), 0, row, bias_value, residual, out, N, beta, HAS_RESIDUAL, GELU)
    if M > 1:
        finish_row(tl.sum(acc1, 1), 1, row, bias_value, residual, out, N, beta, HAS_RESIDUAL, GELU)
    if M > 2:
        finish_row(tl.sum(acc2, 1), 2, row, bias_value, residual, out, N, beta, HAS_RESIDUAL, GELU)
    if M > 3:
        finish_row(tl.sum(acc3, 1), 3, row, bias_value, residual, out, N, beta, HAS_RESIDUAL, GELU)


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
    AHEAD: tl.constexpr,
    EVEN_N: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    """A GEMV whose programs own many row blocks, so that x (BLOCK_K >= K) is read, and normalised, once per program."""
    EVEN_K: tl.constexpr = K == BLOCK_K
    column = tl.arange(0, BLOCK_K)
    tile = tl.program_id(0)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w = load_weight(weight, row, column, N, K, EVEN_N, EVEN_K)
    if NORM:
        g = tl.load(gamma + column, mask=column < K, other=0.0).to(tl.float32)
        s = tl.load(shift + column, mask=column < K, other=0.0).to(tl.float32)
    if PDL:
        for turn in tl.static_range(1, AHEAD + 1):
            prefetch_weight(weight, row + turn * tl.num_programs(0) * BLOCK_N, N, 0, K, BLOCK_K)
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
        finish_row(tl.sum(product, 1), 0, row, bias_value, residual, out, N, beta, HAS_RESIDUAL, GELU)


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
    """out [M, N] = epilogue(x [M, K] weight [N, K]^T), 1 <= M <= 4; all contiguous. Looping grids serve M = 1 only."""
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
        multiprocessor_count(x.device) * (WARPS_PER_MULTIPROCESSOR // config.num_warps),
        K=k,
        M=rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PREFETCH=min(config.prefetch, triton.next_power_of_2(k - config.block_k)) if k > config.block_k else 0,
        AHEAD=config.ahead,
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
    """out [1, N] = epilogue(LayerNorm(x [1, K]) weight [N, K]^T); without gamma x is taken as it is."""
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
        AHEAD=config.ahead,
        EVEN_N=n % config.block_n == 0,
        NORM=gamma is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )
