"""x W^T + bias, then GELU or + beta * residual: GEMV, tensor cores or cuBLAS by the number of rows."""

import torch

from .. import configs
from ..common import require
from ..fast_gelu import fast_gelu
from ..skip_layer_norm import skip_layer_norm
from ..workspace import Workspace, default_workspace
from .gemv import launch_gemv, launch_persistent_gemv
from .small_batch_matmul import launch_small_batch_matmul, padded_rows

MOST_GEMV_ROWS = 4
# Above, cuBLAS is faster: 64 rows of the layers' products take it 4.6 ms on an H100, and the kernel here 6.2 ms.
MOST_DOT_ROWS = 32


def fused_matmul_bias(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    beta: float = 1.0,
    gelu: bool = False,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return x weight^T + bias, then ``fast_gelu`` or + beta * residual; summed in float32 and rounded once.

    Args:
        x: [..., K]. weight: [N, K], contiguous. bias: [N] or None. residual: [..., N] or None. out: [..., N].

    Raises:
        ValueError: a shape does not fit, or both ``gelu`` and ``residual`` are given.
    """
    n, k = weight.shape
    require(x.shape[-1] == k, f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: the last axes must be equal")
    require(not (gelu and residual is not None), "gelu and residual exclude each other; pass one of them")
    x_rows = x.reshape(-1, k)
    rows = x_rows.shape[0]
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    if rows == 0:
        return out
    require(weight.is_contiguous() and out.is_contiguous(), "weight and out must be contiguous")
    x_rows = x_rows.contiguous()
    if residual is not None:
        require(residual.shape == out.shape, f"residual is {tuple(residual.shape)}; it must be {tuple(out.shape)}")
        residual = residual.contiguous()
    tables = configs.family(x.device)
    two_bytes = x.element_size() == 2
    if rows <= (1 if two_bytes else MOST_GEMV_ROWS):
        config = configs.gemv_config(tables, n, k, x.element_size())
        launch_gemv(x_rows, weight, bias, residual, beta, gelu, out, config)
    elif two_bytes and rows <= MOST_DOT_ROWS:
        config = configs.dot_config(tables, padded_rows(rows), n, k)
        workspace = workspace or default_workspace(x.device, rows)
        launch_small_batch_matmul(
            x_rows, weight, bias, residual, beta, gelu, out, config, workspace.partial, workspace.counters
        )
    else:
        _library(x_rows, weight, bias, residual, beta, gelu, out.view(rows, n))
    return out


def _library(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu: bool,
    out: torch.Tensor,
) -> None:
    """Compute the same through cuBLAS; x [M, K], out [M, N]."""
    if residual is not None and bias is None:
        torch.addmm(residual.view(out.shape), x, weight.t(), beta=beta, out=out)
        return
    torch.addmm(bias, x, weight.t(), out=out) if bias is not None else torch.mm(x, weight.t(), out=out)
    if gelu:
        fast_gelu(out, out=out)
    if residual is not None:
        out.add_(residual.view(out.shape), alpha=beta)


def layer_norm_matmul_bias(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gelu: bool = False,
    normed_out: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``fused_matmul_bias(skip_layer_norm(x, gamma, beta), weight, bias, gelu=gelu)`` and the normalised x.

    It takes one launch if the tables say that normalising inside the GEMV pays, else two.

    Args:
        x: [..., K]. gamma, beta: [K]. weight: [N, K]. bias: [N] or None.

    Returns:
        out [..., N] and normed_out [..., K].
    """
    n, k = weight.shape
    normed_out = torch.empty_like(x) if normed_out is None else normed_out
    config = configs.layer_norm_gemv_config(configs.family(x.device), n, k, x.element_size())
    if config is None or x.numel() != k:
        skip_layer_norm(x, gamma, beta, epsilon=epsilon, out=normed_out)
        return fused_matmul_bias(normed_out, weight, bias, gelu=gelu, out=out, workspace=workspace), normed_out
    out = x.new_empty(*x.shape[:-1], n) if out is None else out
    launch_persistent_gemv(x.contiguous(), gamma, beta, epsilon, weight, bias, None, 1.0, gelu, normed_out, out, config)
    return out, normed_out
