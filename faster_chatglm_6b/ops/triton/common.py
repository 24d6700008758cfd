"""Device functions and launch helpers that the kernels share."""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_successor(PDL: tl.constexpr, HOLDS_BACK: tl.constexpr = False):
    """Let the next kernel start once all programs of this one run; call it first if work precedes the wait.

    HOLDS_BACK: leave that to ``wait_for_predecessor``.
    """
    if PDL and not HOLDS_BACK:
        gdc_launch_dependents()


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr, HOLDS_BACK: tl.constexpr = False):
    """Let the next kernel start, then wait until every earlier kernel is done and its writes are visible.

    HOLDS_BACK: wait first, so that of all later kernels only the next one can be waiting.

    Under programmatic dependent launch a kernel starts while its predecessor still runs. Read what the predecessors
    may write after this call only. Every kernel calls it, so waiting for the predecessor means waiting for all before
    it.
    """
    if PDL:
        if not HOLDS_BACK:
            gdc_launch_dependents()
        gdc_wait()
        if HOLDS_BACK:
            gdc_launch_dependents()


_PREFETCH = tl.constexpr("""{
.reg .pred p; .reg .u32 t; .reg .u64 a;
mov.u32 t, %tid.x;
setp.lt.s32 p, t, $3;
mad.wide.u32 a, t, $2, $1;
@p cp.async.bulk.prefetch.L2.global [a], $4;
mov.u32 $0, 0;
}""")


@triton.jit
def prefetch_to_l2(pointer, stride, count, bytes):
    """Ask the L2 cache for ``bytes`` bytes at ``pointer`` + i * ``stride`` bytes, 0 <= i < ``count``, without waiting.

    Thread i asks for piece i, so ``count`` may not exceed the threads of a program. ``bytes`` and ``stride`` must be
    multiples of 16. Needs compute capability 9.0 or later.
    """
    # The instruction takes 16-byte aligned addresses only.
    address = pointer.to(tl.int64) & -16
    arguments = [address, tl.cast(stride, tl.int32), tl.cast(count, tl.int32), tl.cast(bytes, tl.int32)]
    tl.inline_asm_elementwise(_PREFETCH, "=r,l,r,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def gelu(x):
    """Return tanh GELU of float32 x, written as x * sigmoid(2 y) because 0.5 * (1 + tanh(y)) = sigmoid(2 y)."""
    y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * y))


@triton.jit
def order_key(x):
    """Map float32 values to int32 keys of the same order; -0 equals +0, NaN is above +inf."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_key(key):
    """Return the float32 value that ``order_key`` maps to ``key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack_candidate(x, index):
    """Pack x and its index (int32, not negative) into an int64 that orders by value, then lower index first."""
    return (order_key(x).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def candidate_key(packed):
    """Return ``order_key`` of the value in a packed candidate."""
    return (packed >> 32).to(tl.int32)


@triton.jit
def candidate_index(packed):
    """Return the index in a packed candidate, as int64."""
    return 0xFFFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def arrive(counter, expected):
    """Count this program in; return True to the last one, which also resets the counter for the next launch.

    The last program sees everything that the group stored before, if it reads past L1 (``cache_modifier=".cg"``).
    """
    # The barrier puts all threads' stores before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_parts(partial, cell, size, inside, SPLITS: tl.constexpr):
    """Return the sum of the parts, ``size`` apart, that ``SPLITS`` programs stored at ``partial`` + ``cell``.

    It adds in the order of the splits, whichever came last, so that the result does not vary.
    """
    total = tl.zeros(cell.shape, tl.float32)
    for split in range(SPLITS):
        part = partial + tl.cast(split, tl.int64) * size
        total += tl.load(part + cell, mask=inside, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def add_ends(
    acc, bias, residual, row, target, valid, N, beta,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Return the sums [weight rows, rows of x] of a product with its bias, GELU and beta * residual."""
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    if GELU:
        acc = gelu(acc)
    if HAS_RESIDUAL:
        acc += beta * tl.load(residual + target, mask=valid, other=0.0).to(tl.float32)
    return acc


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessor_count(device: torch.device) -> int:
    """Return the multiprocessors of ``device``; 132 without a GPU (interpreter)."""
    if device.type != "cuda":
        return 132
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def pdl_options(pdl: bool) -> dict:
    """Return the launch options of a kernel that may start before its predecessor ends."""
    return {"launch_pdl": True} if pdl else {}


def require_equal_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """Raise ValueError unless the caches are [B, H, T, K] of equal strides with a contiguous last axis."""
    require(
        value_cache.shape == key_cache.shape
        and value_cache.stride() == key_cache.stride()
        and key_cache.stride(3) == 1,
        f"key_cache is {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)}: pass equal ones with a "
        "contiguous last axis",
    )


def require_pages(block_table: torch.Tensor, page: int, batch: int = 0) -> None:
    """Raise ValueError unless a block table is a contiguous [B or more, pages] of pages of a power of two of slots."""
    require(
        block_table.ndim == 2 and block_table.is_contiguous() and block_table.shape[0] >= batch,
        f"block_table is {tuple(block_table.shape)}; pass a contiguous one of {batch} or more rows",
    )
    require(page >= 16 and page & (page - 1) == 0, f"a page has {page} slots; it must be a power of two, at least 16")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition``."""
    if not condition:
        raise ValueError(message)
