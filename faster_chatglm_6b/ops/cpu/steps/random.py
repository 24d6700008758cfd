"""The random numbers of the Triton kernels: Philox 4x32-10 (Salmon et al. 2011) of a seed, a lane and a step."""

import numpy as np
import torch

from .kernel import kernel

_KEYS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


def philox(seed: int, counters: tuple[np.ndarray | int, ...]) -> np.ndarray:
    """Return the first of the four numbers, uint64 below 2^32, of counters that broadcast to one shape."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(one, dtype=np.uint64) for one in counters))
    bits = np.uint64(seed % 2**64)
    k0, k1 = bits & _LOW, bits >> _HIGH
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> _HIGH) ^ c1 ^ k0, b & _LOW, (a >> _HIGH) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0


def uniform(seed: int, step: int, lane: int) -> np.float32:
    """Draw a number in (0, 1) for one step of a lane."""
    number = philox(seed, (0, lane, step, 1))
    return np.float32((np.float32(int(number) >> 8) + np.float32(0.5)) * np.float32(1 / 16777216))


def gumbel(seed: int, step: int, lane: int, index: torch.Tensor) -> torch.Tensor:
    """Draw standard Gumbel noise, -log(-log(u)), one value for each score ``index``, int64 [N]; float32 [N]."""
    compiled = kernel()
    if compiled is not None:
        index = index.contiguous()
        noise = torch.empty(len(index), dtype=torch.float32, device="cpu")
        draw = seed % 2**64, lane % 2**32, step % 2**32
        compiled.library.gumbel(index.data_ptr(), noise.data_ptr(), len(index), *draw, torch.get_num_threads())
        return noise
    return torch.from_numpy(gumbel_in_numpy(seed, step, lane, index.numpy()))


def gumbel_in_numpy(seed: int, step: int, lane: int, index: np.ndarray) -> np.ndarray:
    """Draw what ``gumbel`` draws: its definition."""
    number = philox(seed, (index, lane % 2**32, step % 2**32, 0))
    u = (number.astype(np.float32) + np.float32(0.5)) * np.float32(1 / 4294967296)
    series = u * (1 + u * (np.float32(0.5) + u * np.float32(1 / 3)))
    # The series keeps the digits of the small values, which are the ones that win.
    exponential = np.where(u < np.float32(1e-3), series, -np.log1p(-u.clip(max=np.float32(1 - 2**-24))))
    return -np.log(exponential)
