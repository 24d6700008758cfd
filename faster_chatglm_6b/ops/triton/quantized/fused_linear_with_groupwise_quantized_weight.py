"""x W^T + bias for an int8 or int4 weight, then GELU or + beta * residual; the shapes decide which kernel serves."""

import functools
from collections.abc import Callable, Iterator

import torch

from ..common import require
from ..linear.fused_matmul_bias import fused_matmul_bias
from ..skip_layer_norm import skip_layer_norm
from ..workspace import Workspace, default_workspace
from .configs import (
    MOST_TILE_ROWS,
    Row,
    few_rows_config,
    quantized_config,
    row_config,
    rows_for,
    tiles_config,
)
from .dequantize import dequantize
from .few_rows.rows import MOST_ROWS as MOST_FEW_ROWS
from .few_rows.rows import launch_quantized_few_rows
from .gemv import launch_quantized_gemv
from .matmul import launch_quantized_matmul, serves, tiles_of
from .one_row.norm import NormArguments
from .one_row.row import launch_quantized_row, normalises
from .pipelined.launch import launch_quantized_pipelined, serves_pipelined
from .pipelined.tables import pipelined_config
from .tiles import launch_quantized_tiles, serves_tiles
from .trial import holds

# If the tensor-core kernel does not serve, more rows than this dequantise the weight for the library.
MOST_GEMV_ROWS = 8
# Most values of weight rows dequantised at a time (256 MiB of halves).
_DEQUANTISED_VALUES = 1 << 27


def fused_linear_with_groupwise_quantized_weight(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    residual: torch.Tensor | None = None,
    beta: float = 1.0,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return x weight^T + bias, then ``fast_gelu`` or + beta * residual; summed in float32 and rounded once.

    Up to 256 rows of x read the stored integers; for more the weight is dequantised for cuBLAS.

    Args:
        x: [..., K]. w: int8 [N, K * num_bits / 8] in the stored format, contiguous. w_scale: [N], or
            [N, K / group_size] with groups, any floating dtype. bias: [N] or None. residual: [..., N] or None.
        num_bits: 8 or 4. group_size: columns per scale, even, or -1. out: [..., N]. workspace: scratch memory.

    Raises:
        ValueError: a shape does not fit, or both ``gelu`` and ``residual`` are given.
    """
    n, k = w.shape[0], w.shape[1] * 8 // num_bits
    require(num_bits in (4, 8), f"num_bits is {num_bits}; it must be 4 or 8")
    require(x.shape[-1] == k, f"x is {tuple(x.shape)} and the weight [{n}, {k}]: the last axes must be equal")
    groups = 1 if group_size < 0 else k // group_size
    require(
        groups * (k if group_size < 0 else group_size) == k and w_scale.numel() == n * groups,
        f"w_scale is {tuple(w_scale.shape)}, but a weight [{n}, {k}] with group_size {group_size} needs "
        f"[{n}, {groups}]",
    )
    require(not (gelu and residual is not None), "gelu and residual exclude each other; pass one of them")
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    rows = x.numel() // k
    if rows == 0:
        return out
    require(
        w.is_contiguous() and w_scale.is_contiguous() and out.is_contiguous(), "w, w_scale and out must be contiguous"
    )
    x_rows = x.reshape(rows, k).contiguous()
    if residual is not None:
        require(residual.shape == out.shape, f"residual is {tuple(residual.shape)}; it must be {tuple(out.shape)}")
        residual = residual.contiguous()
    group_size = -1 if groups == 1 else group_size
    arguments = (x_rows, w, w_scale, num_bits, group_size, bias, residual, beta, gelu, out.view(rows, n))
    if _launch_on_tensor_cores(*arguments, workspace):
        return out
    if rows <= MOST_GEMV_ROWS:
        launch_quantized_gemv(x_rows, w, w_scale, num_bits, bias, residual, beta, gelu, out)
    else:
        _library(x_rows, w, w_scale, bias, num_bits, residual, beta, gelu, out.view(rows, n), workspace)
    return out


def _kernels_on_tensor_cores(
    x: torch.Tensor, w: torch.Tensor, bits: int, group_size: int, workspace: Workspace | None
) -> Iterator[tuple[str, object, Callable[..., None]]]:
    """List the kernels whose shapes fit x [M, K], best first: name, configuration, and what launches it."""
    rows, (n, k) = x.shape[0], (w.shape[0], x.shape[1])
    if rows > 1:
        workspace = workspace or default_workspace(x.device, 1)
        scratch = {"partial": workspace.partial, "counters": workspace.counters}
    if MOST_FEW_ROWS < rows <= MOST_TILE_ROWS and serves_pipelined(x, w, group_size):
        pipelined = pipelined_config(bits, rows, n, k, workspace)
        if pipelined is not None:
            yield "pipelined", pipelined, functools.partial(launch_quantized_pipelined, config=pipelined, **scratch)
    if MOST_FEW_ROWS < rows <= MOST_TILE_ROWS and serves_tiles(x, w, bits, group_size):
        tiles = tiles_config(x.device, bits, rows, n, k, group_size, workspace)
        yield "tiles", tiles, functools.partial(launch_quantized_tiles, config=tiles, **scratch)
    if serves(x, w, bits, group_size):
        if rows == 1:
            row = row_config(rows_for(x.device), bits, n, k)
            yield "row", row, functools.partial(launch_quantized_row, config=row)
        elif rows <= MOST_FEW_ROWS:
            few = few_rows_config(x.device, bits, n, k, group_size, workspace)
            if few is not None:
                yield "few rows", few, functools.partial(launch_quantized_few_rows, config=few, **scratch)
        if rows > 1:
            matmul = quantized_config(bits, tiles_of(rows), k)
            yield "matmul", (tiles_of(rows), matmul), functools.partial(launch_quantized_matmul, config=matmul)


def _launch_on_tensor_cores(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu: bool,
    out: torch.Tensor,
    workspace: Workspace | None,
) -> bool:
    """Launch the best kernel whose shapes fit and which passes its trial; return False if there is none."""
    for name, config, launch in _kernels_on_tensor_cores(x, w, bits, group_size, workspace):

        def call(x, w, w_scale, bias, residual, out, launch=launch) -> None:
            launch(x, w, w_scale, bits, group_size, bias, residual, beta, gelu, out)

        if holds(name, config, call, x, w, w_scale, bits, group_size, bias, residual, gelu):
            call(x, w, w_scale, bias, residual, out)
            return True
    return False


def _library(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    residual: torch.Tensor | None,
    beta: float,
    gelu: bool,
    out: torch.Tensor,
    workspace: Workspace | None,
) -> None:
    """Compute the same with float products, as many weight rows at a time as memory allows; x [M, K], out [M, N]."""
    n, k = out.shape[1], x.shape[1]
    step = max(_DEQUANTISED_VALUES // k, 1)
    if n <= step:
        weight = dequantize(w, w_scale, bits, x.dtype)
        fused_matmul_bias(x, weight, bias, _view(residual, out), beta, gelu, out, workspace)
        return
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        weight = dequantize(w[part], w_scale[part], bits, x.dtype)
        part_bias = None if bias is None else bias[part]
        part_residual = None if residual is None else residual.view(out.shape)[:, part]
        out[:, part] = fused_matmul_bias(x, weight, part_bias, part_residual, beta, gelu, None, workspace)


def _view(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.view(like.shape)


def layer_norm_quantized_linear(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_bits: int = 8,
    group_size: int = -1,
    gelu: bool = False,
    normed_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product above of ``skip_layer_norm(x, gamma, beta)``, and the normalised x.

    It takes two launches, or one if the tables say that it is faster (``Row.normalises``). With two, under programmatic
    dependent launch, the product's weights are on their way while LayerNorm runs.

    Args:
        x: [..., K]. gamma, beta: [K]. The rest as above.

    Returns:
        out [..., N] and normed_out [..., K].
    """
    normed_out = torch.empty_like(x) if normed_out is None else normed_out
    norm = NormArguments(gamma, beta, epsilon, normed_out)
    config = _config_of_one_launch(x, norm, w, w_scale, bias, num_bits, group_size, gelu)
    if config is not None:
        (n, k), shape = (w.shape[0], x.shape[-1]), x.shape[:-1]
        out = x.new_empty(*shape, n) if out is None else out
        row = x.reshape(1, k).contiguous()
        launch_quantized_row(row, w, w_scale, num_bits, group_size, bias, None, 1.0, gelu, out.view(1, n), config, norm)
        return out, normed_out
    skip_layer_norm(x, gamma, beta, epsilon=epsilon, out=normed_out)
    out = fused_linear_with_groupwise_quantized_weight(
        normed_out, w, w_scale, bias, num_bits, group_size, gelu=gelu, out=out, workspace=workspace
    )
    return out, normed_out


def _config_of_one_launch(
    x: torch.Tensor,
    norm: NormArguments,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    gelu: bool,
) -> Row | None:
    """Choose the product that includes LayerNorm, or None; two launches report what does not fit together."""
    (n, k), groups = (w.shape[0], w.shape[1] * 8 // bits), 1 if group_size < 0 else x.shape[-1] // group_size
    vectors = (norm.gamma, norm.beta, norm.out.view(-1))
    config = row_config(rows_for(x.device), bits, n, k)
    fits = (
        x.numel() == x.shape[-1] == k
        and normalises(bits, k, config)
        and serves(x.reshape(1, k), w, bits, group_size)
        and w_scale.numel() == n * groups
        and all(t.shape == (k,) and t.dtype == x.dtype and t.data_ptr() % 16 == 0 for t in vectors)
        and all(t.is_contiguous() for t in (*vectors, w, w_scale))
    )
    if not fits:
        return None

    def call(x, w, w_scale, bias, residual, out) -> None:
        plain = NormArguments(torch.ones_like(norm.gamma), torch.zeros_like(norm.beta), 1e-5, torch.empty_like(x))
        launch_quantized_row(x, w, w_scale, bits, group_size, bias, residual, 1.0, gelu, out, config, plain)

    row = x.reshape(1, k)
    held = holds("row", config, call, row, w, w_scale, bits, group_size, bias, None, gelu, normalises=True)
    return config if held else None
