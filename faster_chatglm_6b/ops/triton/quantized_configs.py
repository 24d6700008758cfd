"""Shapes of the products with integer weights, measured by ``examples/tune_quantized_kernels.py``.

Keys are (N, K) of a weight [N, K].
"""

import math
from dataclasses import dataclass, field

import torch

from . import configs


@dataclass(frozen=True)
class Quantized:
    """A program takes 16 * ``row_warps`` weight rows; ``column_warps`` warps share the columns of a row between them.

    Each warp has ``depth`` steps of 64 bytes per row under way.
    """

    row_warps: int
    column_warps: int
    depth: int


@dataclass(frozen=True)
class QuantizedFamily:
    """Tables of one GPU family: bits, then tiles of eight rows of x (1, 2, 4, 8), then the weight's shape."""

    tables: dict[tuple[int, int], dict[tuple[int, int], Quantized]] = field(default_factory=dict)


_DEFAULT = {1: Quantized(1, 8, 4), 2: Quantized(1, 8, 2), 4: Quantized(1, 4, 1), 8: Quantized(1, 4, 1)}
_HIDDEN, _INNER = 4096, 16384
_HOPPER = QuantizedFamily(
    {
        (bits, 1): {
            (3 * _HIDDEN, _HIDDEN): Quantized(1, 2, 8),
            (_HIDDEN, _HIDDEN): Quantized(1, 4, 8),
            (_INNER, _HIDDEN): Quantized(1, 2, 8),
            (_HIDDEN, _INNER): Quantized(1, 8, 8),
            (130528, _HIDDEN): Quantized(1, 2, 8),
        }
        for bits in (4, 8)
    }
)
_OTHER = QuantizedFamily()
# Bytes of a weight row that a warp takes in one step.
CHUNK_BYTES = 64


def quantized_family(device: torch.device) -> QuantizedFamily:
    """The tables for ``device``."""
    return _HOPPER if configs.capability(device) >= (9, 0) else _OTHER


def quantized_config(tables: QuantizedFamily, bits: int, tiles: int, n: int, k: int) -> Quantized:
    """Configuration of the product with an integer weight [n, k] and 8 * ``tiles`` rows of x."""
    config = tables.tables.get((bits, tiles), {}).get((n, k), _DEFAULT[tiles])
    chunks = k * bits // 8 // CHUNK_BYTES
    columns = min(config.column_warps, 1 << int(math.log2(max(chunks, 1))))
    return Quantized(config.row_warps, columns, min(config.depth, -(-chunks // columns)))
