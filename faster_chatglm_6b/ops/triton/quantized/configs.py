"""Shapes of the products with integer weights, measured by ``examples/measuring/tune_quantized_kernels.py``.

Keys are (N, K) of a weight [N, K]. Those named HOPPER were found on an NVIDIA H200; nobody has tuned the others.
"""

import math
from dataclasses import dataclass, replace

import torch

from .. import configs
from ..workspace import Workspace


@dataclass(frozen=True)
class Quantized:
    """For up to 64 rows of x: a program takes 16 * ``row_warps`` weight rows.

    ``column_warps`` warps share the columns of a row. Each warp has ``depth`` steps of 64 bytes per row under way.
    """

    row_warps: int
    column_warps: int
    depth: int


@dataclass(frozen=True)
class FewRows:
    """For 2 to 8 rows of x: a program takes 16 weight rows at a time; its ``warps``, up to 16, share their columns.

    ``depth`` steps of 64 bytes per warp and row are under way, a divisor of a warp's steps; a step takes ``warps`` KiB
    of 40. The columns of a row are in ``splits`` parts, one per program. There are at most ``programs`` per
    multiprocessor; those that do not fit at once start when others end. ``holds_back`` is as in ``Row``.
    """

    warps: int
    depth: int
    splits: int
    programs: int
    holds_back: bool = False


@dataclass(frozen=True)
class Row:
    """For one row of x: a program takes 16 weight rows at a time; its ``warps``, up to 16, share their columns.

    ``lead`` turns of ``span`` (2 or 4) steps of 64 bytes per warp and row are under way, as far as 47 KiB of shared
    memory go: a step takes ``warps`` KiB. ``programs`` is as in ``FewRows``.

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


@dataclass(frozen=True)
class Tiles:
    """For 9 to 256 rows of x: a program takes ``block_m`` of them, ``block_n`` weight rows, and ``block_k`` columns of
    both at a time.

    ``num_stages`` - 1 such blocks are under way. The columns of a row are in ``splits`` parts.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


# The tables of one GPU family: by bits, then by the weight's shape; for many rows of x, by their padded number between.
FewRowsTables = dict[int, dict[tuple[int, int], FewRows]]
Rows = dict[int, dict[tuple[int, int], Row]]
TileTables = dict[int, dict[int, dict[tuple[int, int], Tiles]]]

_DEFAULT = {2: Quantized(1, 8, 2), 4: Quantized(1, 4, 1), 8: Quantized(1, 4, 1)}
_HIDDEN, _INNER = 4096, 16384
_DEFAULT_FEW_ROWS = FewRows(8, 4, 1, 2)
# With scales of groups a thread needs more registers, so fewer threads of more programs are faster.
_FEW_ROWS_OF_GROUPS = FewRows(4, 4, 2, 4)
_HOPPER_FEW_ROWS: FewRowsTables = {
    4: {
        (3 * _HIDDEN, _HIDDEN): FewRows(8, 2, 1, 2),
        (_HIDDEN, _HIDDEN): FewRows(16, 2, 1, 1),
    },
}
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
_HOPPER_TILES: TileTables = {
    8: {
        16: {
            (3 * _HIDDEN, _HIDDEN): Tiles(16, 64, 256, 4, 3, 2),
            (_HIDDEN, _HIDDEN): Tiles(16, 64, 256, 4, 4, 4),
            (_INNER, _HIDDEN): Tiles(16, 64, 128, 4, 5, 2),
            (_HIDDEN, _INNER): Tiles(16, 64, 128, 4, 5, 8),
            (130528, _HIDDEN): Tiles(16, 64, 128, 4, 4),
        },
        32: {
            (3 * _HIDDEN, _HIDDEN): Tiles(32, 64, 128, 4, 5, 2),
            (_HIDDEN, _HIDDEN): Tiles(32, 64, 256, 4, 3, 4),
            (_INNER, _HIDDEN): Tiles(32, 64, 128, 4, 4, 2),
            (_HIDDEN, _INNER): Tiles(32, 64, 128, 4, 4, 8),
            (130528, _HIDDEN): Tiles(32, 64, 128, 4, 5),
        },
        64: {
            (3 * _HIDDEN, _HIDDEN): Tiles(64, 64, 128, 4, 3, 2),
            (_HIDDEN, _HIDDEN): Tiles(64, 64, 256, 4, 3, 2),
            (_INNER, _HIDDEN): Tiles(64, 64, 128, 4, 4),
            (_HIDDEN, _INNER): Tiles(64, 64, 128, 4, 4, 4),
            (130528, _HIDDEN): Tiles(64, 128, 128, 8, 3),
        },
        128: {
            (3 * _HIDDEN, _HIDDEN): Tiles(64, 64, 128, 4, 3),
            (_HIDDEN, _HIDDEN): Tiles(128, 64, 128, 4, 3, 4),
            (_INNER, _HIDDEN): Tiles(128, 128, 128, 8, 3),
            (_HIDDEN, _INNER): Tiles(128, 64, 128, 4, 3, 4),
            (130528, _HIDDEN): Tiles(128, 128, 64, 8, 4),
        },
        256: {
            (3 * _HIDDEN, _HIDDEN): Tiles(128, 128, 64, 8, 4),
            (_HIDDEN, _HIDDEN): Tiles(128, 64, 64, 4, 4, 2),
            (_INNER, _HIDDEN): Tiles(128, 128, 64, 8, 4),
            (_HIDDEN, _INNER): Tiles(128, 128, 64, 4, 4, 4),
            (130528, _HIDDEN): Tiles(256, 128, 64, 8, 3),
        },
    },
    4: {
        16: {
            (3 * _HIDDEN, _HIDDEN): Tiles(16, 64, 256, 4, 3, 2),
            (_HIDDEN, _HIDDEN): Tiles(16, 128, 128, 8, 4, 8),
            (_INNER, _HIDDEN): Tiles(16, 128, 128, 8, 4, 2),
            (_HIDDEN, _INNER): Tiles(16, 128, 128, 8, 4, 8),
        },
        32: {
            (3 * _HIDDEN, _HIDDEN): Tiles(32, 64, 256, 4, 3, 2),
            (_HIDDEN, _HIDDEN): Tiles(32, 64, 128, 4, 4, 8),
            (_INNER, _HIDDEN): Tiles(32, 128, 256, 8, 3),
            (_HIDDEN, _INNER): Tiles(32, 64, 128, 4, 4, 8),
        },
        64: {
            (3 * _HIDDEN, _HIDDEN): Tiles(64, 64, 128, 4, 3, 2),
            (_HIDDEN, _HIDDEN): Tiles(64, 64, 256, 4, 3, 4),
            (_INNER, _HIDDEN): Tiles(64, 64, 128, 4, 4),
            (_HIDDEN, _INNER): Tiles(64, 64, 256, 4, 3, 4),
        },
        128: {
            (3 * _HIDDEN, _HIDDEN): Tiles(128, 64, 128, 4, 3),
            (_HIDDEN, _HIDDEN): Tiles(128, 64, 128, 4, 3, 4),
            (_INNER, _HIDDEN): Tiles(128, 64, 128, 4, 3),
            (_HIDDEN, _INNER): Tiles(128, 64, 128, 4, 3, 4),
        },
        256: {
            (3 * _HIDDEN, _HIDDEN): Tiles(128, 128, 64, 8, 4),
            (_HIDDEN, _HIDDEN): Tiles(256, 64, 64, 8, 4, 2),
            (_INNER, _HIDDEN): Tiles(128, 128, 64, 8, 4),
            (_HIDDEN, _INNER): Tiles(128, 128, 64, 4, 4, 4),
        },
    },
}
_OTHER_TILES: TileTables = {8: {}, 4: {}}
# For weights that are not listed; their columns are split so that there are programs for every multiprocessor.
_DEFAULT_HOPPER_TILES = {
    16: Tiles(16, 64, 128, 4, 5),
    32: Tiles(32, 64, 128, 4, 4),
    64: Tiles(64, 64, 128, 4, 4),
    128: Tiles(128, 128, 64, 8, 4),
    256: Tiles(256, 128, 64, 8, 4),
}
# They fit into the 99 KiB of shared memory of 8.6 and 8.9.
_DEFAULT_TILES = {
    16: Tiles(16, 64, 128, 4, 4),
    32: Tiles(32, 64, 128, 4, 4),
    64: Tiles(64, 64, 64, 4, 4),
    128: Tiles(128, 64, 64, 8, 3),
    256: Tiles(256, 64, 32, 8, 3),
}
# Programs that the columns of a weight without a configuration are split into, and the most parts.
_PROGRAMS, _MOST_SPLITS = 264, 8
# Rows of x up to which ``Tiles`` serves; more are left to dequantising and the library.
MOST_TILE_ROWS = 256
# Bytes of a weight row that a warp takes in one step.
CHUNK_BYTES = 64


def rows_for(device: torch.device) -> Rows:
    """Return the table of one row of x for ``device``."""
    return _HOPPER_ROWS if configs.capability(device) >= (9, 0) else _OTHER_ROWS


def row_config(rows: Rows, bits: int, n: int, k: int) -> Row:
    """Choose the product with an integer weight [n, k] and one row of x."""
    config = rows.get(bits, {}).get((n, k), _DEFAULT_ROW)
    warps, _ = _limit_to_chunks(bits, k, config.warps, 1)
    return replace(config, warps=warps)


def few_rows_config(
    device: torch.device, bits: int, n: int, k: int, group_size: int, workspace: Workspace
) -> FewRows | None:
    """Choose the product with an integer weight [n, k] and 2 to 8 rows of x; None if there is no room for its sums."""
    table = _HOPPER_FEW_ROWS if configs.capability(device) >= (9, 0) else {}
    config = table.get(bits, {}).get((n, k), _DEFAULT_FEW_ROWS) if group_size < 0 else _FEW_ROWS_OF_GROUPS
    return fit_few_rows(config, bits, n, k, workspace)


def fit_few_rows(config: FewRows, bits: int, n: int, k: int, workspace: Workspace) -> FewRows | None:
    """Limit warps, steps and splits to a weight [n, k]; return None if ``workspace`` has no room for the splits.

    A thread keeps 64 words of x at most.
    """
    chunks = k * bits // 8 // CHUNK_BYTES
    most_steps = bits
    warps = min(config.warps, 1 << int(math.log2(max(chunks, 1))))
    splits = min(max(config.splits, math.ceil(chunks / (warps * most_steps))), chunks)
    # A part without columns would have nothing to add.
    while (splits - 1) * math.ceil(chunks / splits) >= chunks:
        splits -= 1
    steps = math.ceil(math.ceil(chunks / splits) / warps)
    if splits > 1 and splits * math.ceil(n / 16) * 128 > workspace.partial.numel() or steps > most_steps:
        return None
    depth = max(d for d in range(1, steps + 1) if steps % d == 0 and (d == 1 or d <= config.depth))
    return replace(config, warps=warps, depth=depth, splits=splits)


def quantized_config(bits: int, tiles: int, k: int) -> Quantized:
    """Choose the product with an integer weight [N, k] and 8 * ``tiles`` rows of x, more than eight."""
    config = _DEFAULT[tiles]
    columns, depth = _limit_to_chunks(bits, k, config.column_warps, config.depth)
    return Quantized(config.row_warps, columns, depth)


def tiles_config(
    device: torch.device, bits: int, rows: int, n: int, k: int, group_size: int, workspace: Workspace
) -> Tiles:
    """Choose the product with an integer weight [n, k] and more than eight rows of x.

    A block of columns lies in one group. There are as many splits at most as ``workspace`` has room for.
    """
    hopper = configs.capability(device) >= (9, 0)
    tables, default = (_HOPPER_TILES, _DEFAULT_HOPPER_TILES) if hopper else (_OTHER_TILES, _DEFAULT_TILES)
    padded = min(max(1 << (rows - 1).bit_length(), 16), 256)
    config = tables[bits].get(padded, {}).get((n, k))
    if config is None:
        config = default[padded]
        splits = _PROGRAMS // math.ceil(n / config.block_n)
        config = replace(config, splits=min(1 << max(splits, 1).bit_length() - 1, _MOST_SPLITS))
    return fit_tiles(config, rows, n, k, group_size, workspace)


def fit_tiles(config: Tiles, rows: int, n: int, k: int, group_size: int, workspace: Workspace) -> Tiles:
    """Limit a block to a group or a row of ``k`` columns, and the splits to the row and to ``workspace``."""
    block_m = config.block_m
    block_k = min(config.block_k, 1 << (k - 1).bit_length())
    if group_size > 0:
        # The largest power of two that divides the group.
        block_k = min(block_k, group_size & -group_size)
        # A thread holds the sums of a group beside those of the row; 128 of each would not fit.
        while block_m > 16 and block_m * config.block_n > 64 * 32 * config.num_warps:
            block_m //= 2
    blocks = math.ceil(rows / block_m)
    splits, column_blocks = max(min(config.splits, k // block_k), 1), math.ceil(k / block_k)
    # Halving keeps the parts even. A part without columns would ask the cache for a negative number of bytes.
    while splits > 1 and (
        splits * blocks * n * block_m > workspace.partial.numel()
        or (splits - 1) * math.ceil(column_blocks / splits) >= column_blocks
    ):
        splits //= 2
    if blocks * math.ceil(n / config.block_n) > workspace.counters.numel():
        splits = 1
    return replace(config, block_m=block_m, block_k=block_k, splits=splits)


def _limit_to_chunks(bits: int, k: int, warps: int, depth: int) -> tuple[int, int]:
    """Limit the warps of a row of ``k`` columns, and the steps ahead, to its number of chunks."""
    chunks = k * bits // 8 // CHUNK_BYTES
    warps = min(warps, 1 << int(math.log2(max(chunks, 1))))
    return warps, min(depth, -(-chunks // warps))
