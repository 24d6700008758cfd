"""Shapes of the products with integer weights, measured by ``examples/measuring/tune_quantized_kernels.py``.

Keys are (N, K) of a weight [N, K].
"""

import math
from dataclasses import dataclass, replace

import torch

from .. import configs


@dataclass(frozen=True)
class Quantized:
    """For more than eight rows of x: a program takes 16 * ``row_warps`` weight rows.

    ``column_warps`` warps share the columns of a row. Each warp has ``depth`` steps of 64 bytes per row under way.
    """

    row_warps: int
    column_warps: int
    depth: int


@dataclass(frozen=True)
class Stream:
    """For a few rows of x: a program takes 16 * ``tiles`` weight rows at a time; its ``warps`` share their columns.

    A round is ``depth`` steps of 64 bytes per warp and row, and ``stages`` - 1 rounds are under way. There are at most
    ``programs`` per multiprocessor; those that do not fit at once start when others end.
    """

    tiles: int
    warps: int
    depth: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Row:
    """For one row of x: a program takes 16 weight rows at a time; its ``warps``, up to 16, share their columns.

    ``lead`` turns of ``span`` (2 or 4) steps of 64 bytes per warp and row are under way, as far as 47 KiB of shared
    memory go: a step takes ``warps`` KiB. ``programs`` is as in ``Stream``.

    ``normalises``: if x fits into registers, a LayerNorm before the product is part of it and no launch of its own.

    ``holds_back``: the next kernel starts only once the kernel before is done. Otherwise several later kernels start at
    once and occupy multiprocessors unevenly: some are left with twice the work of others.
    """

    warps: int
    span: int
    lead: int
    programs: int
    normalises: bool = False
    holds_back: bool = False


# The tables of one GPU family: by bits, then by the weight's shape.
Streams = dict[int, dict[tuple[int, int], Stream]]
Rows = dict[int, dict[tuple[int, int], Row]]

_DEFAULT = {2: Quantized(1, 8, 2), 4: Quantized(1, 4, 1), 8: Quantized(1, 4, 1)}
_DEFAULT_STREAM = Stream(1, 8, 2, 3, 2)
_HIDDEN, _INNER = 4096, 16384
_HOPPER: Streams = {
    8: {
        (3 * _HIDDEN, _HIDDEN): Stream(1, 8, 2, 3, 2),
        (_HIDDEN, _HIDDEN): Stream(1, 8, 2, 3, 4),
        (_INNER, _HIDDEN): Stream(1, 8, 2, 3, 2),
        (_HIDDEN, _INNER): Stream(1, 8, 2, 3, 2),
        (130528, _HIDDEN): Stream(1, 8, 2, 3, 4),
    },
    4: {
        (3 * _HIDDEN, _HIDDEN): Stream(1, 8, 4, 3, 1),
        (_HIDDEN, _HIDDEN): Stream(1, 8, 2, 3, 4),
        (_INNER, _HIDDEN): Stream(1, 8, 4, 3, 1),
        (_HIDDEN, _INNER): Stream(2, 8, 2, 3, 1),
    },
}
_OTHER: Streams = {}
_DEFAULT_ROW = Row(4, 4, 2, 3)
_HOPPER_ROWS: Rows = {
    8: {
        (3 * _HIDDEN, _HIDDEN): Row(4, 2, 3, 6, normalises=True),
        (_HIDDEN, _HIDDEN): Row(8, 4, 1, 2, holds_back=True),
        (_INNER, _HIDDEN): Row(8, 4, 1, 4, normalises=True),
        (_HIDDEN, _INNER): Row(8, 4, 1, 2),
        (130528, _HIDDEN): Row(4, 2, 4, 6),
    },
    4: {
        (3 * _HIDDEN, _HIDDEN): Row(4, 4, 1, 6),
        (_HIDDEN, _HIDDEN): Row(8, 4, 1, 2, holds_back=True),
        (_INNER, _HIDDEN): Row(4, 4, 2, 4),
        (_HIDDEN, _INNER): Row(8, 4, 1, 2),
    },
}
_OTHER_ROWS: Rows = {}
# Bytes of a weight row that a warp takes in one step.
CHUNK_BYTES = 64


def streams_for(device: torch.device) -> Streams:
    """Return the table of a few rows of x for ``device``."""
    return _HOPPER if configs.capability(device) >= (9, 0) else _OTHER


def rows_for(device: torch.device) -> Rows:
    """Return the table of one row of x for ``device``."""
    return _HOPPER_ROWS if configs.capability(device) >= (9, 0) else _OTHER_ROWS


def row_config(rows: Rows, bits: int, n: int, k: int) -> Row:
    """Choose the product with an integer weight [n, k] and one row of x."""
    config = rows.get(bits, {}).get((n, k), _DEFAULT_ROW)
    warps, _ = _limit_to_chunks(bits, k, config.warps, 1)
    return replace(config, warps=warps)


def quantized_config(bits: int, tiles: int, k: int) -> Quantized:
    """Choose the product with an integer weight [N, k] and 8 * ``tiles`` rows of x, more than eight."""
    config = _DEFAULT[tiles]
    columns, depth = _limit_to_chunks(bits, k, config.column_warps, config.depth)
    return Quantized(config.row_warps, columns, depth)


def stream_config(streams: Streams, bits: int, n: int, k: int) -> Stream:
    """Choose the product with an integer weight [n, k] and up to eight rows of x."""
    config = streams.get(bits, {}).get((n, k), _DEFAULT_STREAM)
    warps, depth = _limit_to_chunks(bits, k, config.warps, config.depth)
    return replace(config, warps=warps, depth=depth)


def _limit_to_chunks(bits: int, k: int, warps: int, depth: int) -> tuple[int, int]:
    """Limit the warps of a row of ``k`` columns, and the steps ahead, to its number of chunks."""
    chunks = k * bits // 8 // CHUNK_BYTES
    warps = min(warps, 1 << int(math.log2(max(chunks, 1))))
    return warps, min(depth, -(-chunks // warps))
