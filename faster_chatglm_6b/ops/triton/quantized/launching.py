"""The arguments that the launchers of the products with integer weights share."""

from typing import Any

import torch

from ..common import pdl_options
from ..configs import interpreted, uses_pdl
from .configs import CHUNK_BYTES


def shared_options(
    x: torch.Tensor, bits: int, bias: torch.Tensor | None, residual: torch.Tensor | None, gelu_epilogue: bool
) -> dict[str, Any]:
    """Return the constants of every such kernel, and the options of its launch."""
    pdl = uses_pdl(x.device)
    return {
        "BITS": bits,
        "BFLOAT": x.dtype == torch.bfloat16,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "GELU": gelu_epilogue,
        "PDL": pdl,
        "INTERPRETED": interpreted(),
        **pdl_options(pdl),
    }


def words_of_rows(weight: torch.Tensor, bits: int, group_size: int) -> dict[str, int]:
    """Return the constants of the kernels that take the weight in words: those of a row, and chunks per scale."""
    return {
        "KW": weight.shape[1] // 4,
        "GROUP_CHUNKS": 0 if group_size < 0 else group_size * bits // 8 // CHUNK_BYTES,
    }
