"""Shapes of the pipelined product, measured on an NVIDIA H200 (docs/benchmark_log.md)."""

import math
from dataclasses import dataclass, replace

from ...workspace import Workspace


@dataclass(frozen=True)
class Pipelined:
    """A program takes ``block_m`` rows of x and 64 weight rows for each set of ``turns`` of its ``warpgroups``.

    ``warpgroups`` is 2 or 4; ``turns`` divides it. ``stages`` blocks of ``block_k`` columns, a multiple of ``turns``,
    are under way. The columns of a row are in ``splits`` parts, one per program.
    """

    block_m: int
    warpgroups: int
    turns: int
    block_k: int
    stages: int
    splits: int = 1

    @property
    def weight_rows(self) -> int:
        """Weight rows that a program takes."""
        return 64 * self.warpgroups // self.turns


_HIDDEN, _INNER = 4096, 16384
_QKV, _DENSE, _UP, _DOWN = (3 * _HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (_INNER, _HIDDEN), (_HIDDEN, _INNER)
# By bits, then by the padded number of rows of x, then by the weight's shape.
_TABLES: dict[int, dict[int, dict[tuple[int, int], Pipelined]]] = {
    8: {
        16: {
            _QKV: Pipelined(32, 4, 2, 128, 8),
            _UP: Pipelined(32, 4, 2, 128, 8),
            _DOWN: Pipelined(32, 2, 2, 128, 12, 2),
        },
        32: {
            _QKV: Pipelined(32, 4, 2, 128, 8),
            _DENSE: Pipelined(32, 4, 4, 128, 8, 2),
            _UP: Pipelined(32, 4, 2, 128, 8),
            _DOWN: Pipelined(32, 2, 2, 128, 12, 2),
        },
        64: {
            _QKV: Pipelined(64, 4, 2, 64, 10),
            _DENSE: Pipelined(64, 2, 2, 128, 8, 2),
            _UP: Pipelined(64, 4, 2, 64, 10),
            _DOWN: Pipelined(64, 2, 2, 128, 8, 2),
        },
        128: {
            _QKV: Pipelined(128, 2, 1, 64, 8),
            _DENSE: Pipelined(64, 2, 2, 128, 8),
            _UP: Pipelined(128, 2, 1, 64, 8),
            _DOWN: Pipelined(128, 2, 1, 64, 8, 4),
        },
        256: {
            _QKV: Pipelined(256, 2, 1, 64, 4),
            _DENSE: Pipelined(64, 4, 2, 128, 4),
            _UP: Pipelined(256, 2, 1, 64, 4),
            _DOWN: Pipelined(128, 2, 1, 64, 8, 2),
        },
    },
    4: {
        16: {
            _UP: Pipelined(32, 4, 2, 128, 12),
            _DOWN: Pipelined(32, 4, 4, 128, 12, 2),
        },
        32: {
            _QKV: Pipelined(32, 4, 2, 128, 12),
            _DENSE: Pipelined(32, 2, 2, 128, 12, 2),
            _UP: Pipelined(32, 4, 2, 128, 12),
            _DOWN: Pipelined(32, 4, 4, 128, 12, 2),
        },
        64: {
            _QKV: Pipelined(64, 4, 2, 128, 6),
            _DENSE: Pipelined(64, 2, 2, 128, 8, 2),
            _UP: Pipelined(64, 4, 2, 128, 6),
            _DOWN: Pipelined(64, 4, 4, 128, 8, 2),
        },
        128: {
            _QKV: Pipelined(128, 4, 2, 64, 6),
            _DENSE: Pipelined(64, 2, 2, 128, 8),
            _UP: Pipelined(128, 4, 2, 64, 6),
            _DOWN: Pipelined(128, 4, 2, 64, 6, 4),
        },
        256: {
            _QKV: Pipelined(256, 2, 1, 64, 5),
            _DENSE: Pipelined(64, 4, 2, 128, 6),
            _UP: Pipelined(256, 2, 1, 64, 5),
            _DOWN: Pipelined(128, 4, 2, 64, 6, 2),
        },
    },
}
# For weights that are not listed; up to 16 rows those have other kernels.
_DEFAULT = {
    32: Pipelined(32, 4, 2, 128, 8),
    64: Pipelined(64, 4, 2, 64, 10),
    128: Pipelined(128, 2, 1, 64, 8),
    256: Pipelined(256, 2, 1, 64, 4),
}
# Programs that the columns of a weight without a shape are split into, the most parts, and blocks that a part keeps.
_PROGRAMS, _MOST_SPLITS, _LEAST_BLOCKS = 132, 8, 8


def pipelined_config(bits: int, rows: int, n: int, k: int, workspace: Workspace) -> Pipelined | None:
    """Choose the product with an integer weight [n, k] and 9 to 256 rows of x; None where ``tiles`` is as fast."""
    padded = min(max(1 << (rows - 1).bit_length(), 16), 256)
    config = _TABLES[bits][padded].get((n, k))
    if config is None:
        config = _DEFAULT.get(padded)
        if config is None:
            return None
        programs = math.ceil(n / config.weight_rows) * math.ceil(rows / config.block_m)
        splits = min(_PROGRAMS // programs, k // config.block_k // _LEAST_BLOCKS, _MOST_SPLITS)
        config = replace(config, splits=1 << max(splits, 1).bit_length() - 1)
    return fit_pipelined(config, rows, n, workspace)


def fit_pipelined(config: Pipelined, rows: int, n: int, workspace: Workspace) -> Pipelined:
    """Limit the splits of a weight of ``n`` rows to what ``workspace`` has room for."""
    splits = config.splits
    counters = math.ceil(n / config.weight_rows) * math.ceil(rows / config.block_m) * (config.weight_rows // 64)
    while splits > 1 and (splits * rows * n > workspace.partial.numel() or counters > workspace.counters.numel()):
        splits //= 2
    return replace(config, splits=splits)
