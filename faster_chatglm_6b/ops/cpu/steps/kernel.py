"""The C kernel for the functions here, checked against their definitions in PyTorch when it is first asked for."""

import functools

import torch

from .... import report
from .. import between, native
from . import new_rows, places

# For rounding of float32; a wrong address shows as far more.
_TOLERANCE = 1e-5


@functools.cache
def kernel() -> native.Kernel | None:
    """Return the compiled kernel if there is one and it is right."""
    found = between.load()
    if not isinstance(found, native.Kernel):
        return None
    if not _is_right(found):
        report.record_notice(
            f"The C kernel ({found}) is wrong on this machine in attention and rotary positions of the decode loop; "
            "PyTorch computes them."
        )
        return None
    return found


def _is_right(found: native.Kernel) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    make = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    batch, rows, heads, width, slots = 2, 2, 3, 24, 9
    qkv, cos, sin = make(batch, rows, 3 * heads * width), make(7, width // 4), make(7, width // 4)
    caches = [make(batch, heads, slots, width) for _ in range(2)]
    numbers = [torch.tensor(pair, dtype=torch.int32, device="cpu") for pair in ((6, 3), (0, 0), (1, 0), (4, 2), (3, 1))]
    results = []
    for one in (found, None):
        mine, out = [cache.clone() for cache in caches], torch.empty(batch, rows, heads * width, device="cpu")
        step = new_rows.Step(qkv, *mine, *numbers, cos, sin, None, None, out)
        new_rows.run(one, step)
        query, appended = torch.zeros(batch * rows, heads * width, device="cpu"), [cache.clone() for cache in caches]
        # Threads take the rows, so no two rows may have one place.
        offsets = torch.tensor([0, -1, 2 * width, heads * slots * width], device="cpu")
        turns = [torch.tensor([0, 1, 2, 3], dtype=torch.int32, device="cpu") for _ in range(2)]
        flat = qkv.view(batch * rows, -1)
        places.run(one, flat, query, *appended, offsets, *turns, cos, sin)
        results.append(torch.cat([tensor.reshape(-1) for tensor in (out, *mine, query, *appended)]))
    return bool((results[0] - results[1]).abs().max() < _TOLERANCE)
