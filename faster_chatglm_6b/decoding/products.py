"""Compute a decode step's products with float or integer weights; the kernel is chosen at capture."""

from typing import Any

import torch

from ..layers.quantized import QuantizedLinear
from ..ops import triton as kernels


def product(
    linear: Any, x: torch.Tensor, residual: torch.Tensor, beta: float, out: torch.Tensor, workspace: Any
) -> None:
    """Compute out = linear(x) + beta * residual; x is [B, K], residual and out are [B, N]."""
    if isinstance(linear, QuantizedLinear):
        kernels.fused_linear_with_groupwise_quantized_weight(
            x,
            linear.weight,
            linear.weight_scale,
            linear.bias,
            linear.bits,
            linear.group_size,
            residual,
            beta,
            out=out,
            workspace=workspace,
        )
    else:
        kernels.fused_matmul_bias(
            x, linear.weight, linear.bias, residual=residual, beta=beta, out=out, workspace=workspace
        )


def normed_product(
    norm: Any, linear: Any, x: torch.Tensor, gelu: bool, normed_out: torch.Tensor, out: torch.Tensor, workspace: Any
) -> None:
    """Compute normed_out = norm(x) and out = linear(normed_out), then ``fast_gelu`` if asked; x is [B, K]."""
    parameters = (x, norm.weight, norm.bias, norm.eps, linear.weight)
    rest = {"gelu": gelu, "normed_out": normed_out, "out": out, "workspace": workspace}
    if isinstance(linear, QuantizedLinear):
        kernels.layer_norm_quantized_linear(
            *parameters, linear.weight_scale, linear.bias, linear.bits, linear.group_size, **rest
        )
    else:
        kernels.layer_norm_matmul_bias(*parameters, linear.bias, **rest)
