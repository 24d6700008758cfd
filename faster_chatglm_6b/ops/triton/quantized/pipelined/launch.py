"""Where the pipelined product serves, and its launch."""

import functools

import torch
import triton

from ... import configs
from ...common import pdl_options
from .tables import Pipelined

# The releases whose code was read and run. Gluon is experimental: others may mean something else by the same words.
_RELEASES = ("3.6.",)
# Registers of a thread that multiplies, by warpgroups; one that has the sums of 256 rows of x needs more.
_REGISTERS, _MORE_REGISTERS = {2: 168, 4: 112}, 216
_ALIGNMENT = 16


@functools.cache
def _has_gluon() -> bool:
    if not triton.__version__.startswith(_RELEASES):
        return False
    try:
        from . import kernel  # noqa: F401
    except ImportError:
        return False
    return True


def serves_pipelined(x: torch.Tensor, weight: torch.Tensor, group_size: int) -> bool:
    """Tell whether the GPU, Triton, shapes and dtype fit: compute capability 9.0, one scale for each weight row."""
    return (
        configs.capability(x.device) == (9, 0)
        and x.dtype in (torch.float16, torch.bfloat16)
        and group_size < 0
        and weight.shape[1] % _ALIGNMENT == 0
        and x.data_ptr() % _ALIGNMENT == weight.data_ptr() % _ALIGNMENT == 0
        and x.shape[0] * weight.shape[0] < 2**31
        and not configs.interpreted()
        and _has_gluon()
    )


def launch_quantized_pipelined(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    out: torch.Tensor,
    config: Pipelined,
    partial: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, ``serves_pipelined`` is true, and ``config`` is of ``pipelined_config``, which sees to
    it that ``partial`` (float32) and ``counters`` (int32, zero) suffice.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .kernel import quantized_pipelined_kernel

    (rows, k), n = x.shape, weight.shape[0]

    def described(tensor: torch.Tensor, block: list[int], dtype: gl.dtype) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))

    pairs, kind = (weight.view(torch.int16), gl.int16) if bits == 8 else (weight, gl.int8)
    half = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    pdl = configs.uses_pdl(x.device)
    programs = triton.cdiv(n, config.weight_rows) * triton.cdiv(rows, config.block_m)
    quantized_pipelined_kernel[(programs, config.splits)](
        described(x, [config.block_m, config.block_k], half),
        described(pairs, [config.weight_rows, config.block_k // 2], kind),
        scale,
        scale if bias is None else bias,
        x if residual is None else residual,
        out,
        partial,
        counters,
        rows,
        n,
        float(beta),
        K=k,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        WARPGROUPS=config.warpgroups,
        TURNS=config.turns,
        STAGES=config.stages,
        SPLITS=config.splits,
        REGISTERS=_MORE_REGISTERS if config.block_m == 256 else _REGISTERS[config.warpgroups],
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )
