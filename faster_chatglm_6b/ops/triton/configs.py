"""Block shapes per GPU family, measured by ``examples/measuring/tune_kernels.py``; a launch only looks them up.

Keys are (N, K) of a weight [N, K]. Shapes that are not listed use the family's rule for any shape.
"""

import functools
import os
from dataclasses import dataclass, field, replace

import torch
import triton


@dataclass(frozen=True)
class Gemv:
    """GEMV: a program takes ``block_n`` rows, ``block_k`` columns at a time.

    With ``waves`` 0 there is one program per row block. Otherwise the programs loop over row blocks, and the grid is
    ``waves`` times the number of multiprocessors.
    """

    block_n: int
    block_k: int
    num_warps: int
    waves: int = 0


@dataclass(frozen=True)
class Dot:
    """Tensor-core product: ``block_n`` weight rows, ``block_k`` columns per stage, the columns in ``splits`` parts."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True)
class Attention:
    """Decode attention: keys per block, warps, and the number of programs per multiprocessor that splitting aims at.

    ``holds_back``: with one sequence, let the next kernel start only once the kernel before is done, as in ``Row``.
    """

    block_t: int
    num_warps: int
    waves: int
    holds_back: bool = False


@dataclass(frozen=True)
class PromptAttention:
    """Attention of a prompt: rows and keys per block, in numbers of two bytes."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Family:
    """Everything tuned for one GPU family, on the card ``found_on``; "" for tables that nobody has tuned.

    ``gemv`` serves one row of x, of four-byte numbers up to four. ``layer_norm_gemv`` lists the weights whose GEMV
    normalises its input itself; for the others LayerNorm is a launch of its own. ``dot`` maps the padded number of rows
    (16 or 32) to a configuration per weight shape. ``attention_many`` has the configurations from so many sequences
    times heads on. Of fewer, ``attention_short`` serves up to 256 keys and fewer than 256 sequences times heads,
    ``attention`` the rest. ``prompt_attention_short`` serves prompts of up to 64 rows, ``prompt_attention`` the rest.
    """

    gemv_default: Gemv
    attention: Attention
    attention_short: Attention
    prompt_attention: PromptAttention = PromptAttention(64, 64, 4, 3)
    prompt_attention_short: PromptAttention = PromptAttention(32, 64, 4, 2)
    attention_many: dict[int, Attention] = field(default_factory=dict)
    gemv: dict[tuple[int, int], Gemv] = field(default_factory=dict)
    layer_norm_gemv: dict[tuple[int, int], Gemv] = field(default_factory=dict)
    dot: dict[int, dict[tuple[int, int], Dot]] = field(default_factory=dict)
    dot_default: dict[int, Dot] = field(default_factory=dict)
    found_on: str = ""


_DOT_DEFAULT = {
    16: Dot(64, 128, 4, 4),
    32: Dot(64, 128, 4, 4),
}
_AMPERE = Family(
    gemv_default=Gemv(2, 2048, 4),
    attention=Attention(64, 4, 2),
    attention_short=Attention(32, 2, 2),
    dot_default=_DOT_DEFAULT,
)
# 8.6 and 8.9 have 99 KiB of shared memory per program.
_CONSUMER = Family(
    gemv_default=Gemv(2, 2048, 4),
    attention=Attention(64, 4, 2),
    attention_short=Attention(32, 2, 2),
    prompt_attention=PromptAttention(64, 64, 4, 2),
    dot_default=_DOT_DEFAULT,
)
_HOPPER = Family(
    gemv_default=Gemv(2, 2048, 4),
    attention=Attention(128, 4, 4),
    attention_short=Attention(128, 8, 2, holds_back=True),
    # Where there are programs enough without splits, few threads each keep more of the memory busy.
    attention_many={256: Attention(64, 2, 4), 1024: Attention(32, 1, 4)},
    prompt_attention=PromptAttention(128, 64, 8, 3),
    gemv={
        (4096, 4096): Gemv(2, 4096, 8, 4),
        (4096, 16384): Gemv(4, 1024, 4),
    },
    layer_norm_gemv={
        (16384, 4096): Gemv(2, 4096, 4, 8),
    },
    dot={
        16: {
            (12288, 4096): Dot(64, 128, 4, 3, 2),
            (4096, 4096): Dot(64, 128, 4, 4, 4),
            (16384, 4096): Dot(128, 128, 8, 4),
            (4096, 16384): Dot(64, 256, 4, 3, 2),
        },
        32: {
            (4096, 4096): Dot(64, 128, 4, 4, 4),
            (16384, 4096): Dot(128, 128, 8, 3),
            (4096, 16384): Dot(64, 128, 4, 4, 2),
        },
    },
    dot_default=_DOT_DEFAULT,
    found_on="NVIDIA H200",
)
FAMILIES = {(8, 0): _AMPERE, (8, 6): _CONSUMER, (8, 9): _CONSUMER, (9, 0): _HOPPER}


def interpreted() -> bool:
    """Tell whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of ``device``; (0, 0) if it is not a CUDA device."""
    if device.type != "cuda":
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def family(device: torch.device) -> Family:
    """Return the tables for ``device``; an unlisted GPU gets the 8.6/8.9 family's, which fit everywhere."""
    return FAMILIES.get(capability(device), _CONSUMER)


def uses_pdl(device: torch.device) -> bool:
    """Tell whether kernels on ``device`` are launched before their predecessor ends: from compute capability 9.0 on."""
    return capability(device) >= (9, 0) and not interpreted()


def _shrink_to_row(config: Gemv, k: int, element_size: int) -> Gemv:
    """Shrink a configuration tuned for two-byte weights to short rows or to four-byte weights."""
    block_k = min(config.block_k * 2 // element_size, triton.next_power_of_2(k))
    warps = config.num_warps
    while warps > 1 and block_k * config.block_n < warps * 32 * 8:
        warps //= 2
    return replace(config, block_k=block_k, num_warps=warps)


def gemv_config(tables: Family, n: int, k: int, element_size: int) -> Gemv:
    """Choose the GEMV for a weight [n, k] of ``element_size`` bytes per value."""
    return _shrink_to_row(tables.gemv.get((n, k), tables.gemv_default), k, element_size)


def layer_norm_gemv_config(tables: Family, n: int, k: int, element_size: int) -> Gemv | None:
    """Choose the GEMV that normalises its input, or None if two launches are faster or K is too long."""
    config = tables.layer_norm_gemv.get((n, k))
    return None if config is None or element_size != 2 else config


def attention_config(tables: Family, pairs: int, max_length: int, dtype: torch.dtype) -> Attention:
    """Choose decode attention for ``pairs`` sequences times heads and up to ``max_length`` keys in ``dtype``."""
    many = [least for least in tables.attention_many if pairs >= least]
    if many:
        config = tables.attention_many[max(many)]
        if dtype == torch.bfloat16:
            # Its conversion takes registers, of which a block of more keys leaves too few.
            config = replace(config, block_t=min(config.block_t, 32))
    else:
        config = tables.attention_short if pairs < 256 and max_length <= 256 else tables.attention
    return replace(config, block_t=config.block_t * 2 // dtype.itemsize)


def prompt_attention_config(tables: Family, rows: int, element_size: int) -> PromptAttention:
    """Choose a prompt's attention for ``rows`` rows."""
    config = tables.prompt_attention_short if rows <= 64 else tables.prompt_attention
    if element_size == 2:
        return config
    # Products of four-byte numbers take many registers.
    return PromptAttention(16, 32, 8, 2)


def dot_config(tables: Family, rows: int, n: int, k: int) -> Dot:
    """Choose the tensor-core product for ``rows`` (padded to 16 or 32) and a weight [n, k]."""
    config = tables.dot.get(rows, {}).get((n, k), tables.dot_default[rows])
    block_k = min(config.block_k, max(triton.next_power_of_2(k), 16))
    splits = max(min(config.splits, k // block_k), 1)
    return Dot(config.block_n, block_k, config.num_warps, config.num_stages, splits)
