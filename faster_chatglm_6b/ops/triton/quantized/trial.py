"""A small trial of the tensor-core kernels, whose PTX assumes how Triton lays registers out."""

import functools
import logging

import torch
import triton

from ....versions import is_too_old
from .configs import Quantized, Row, Stream
from .matmul import launch_quantized_matmul
from .one_row.row import launch_quantized_row
from .stream import launch_quantized_stream

_logger = logging.getLogger(__name__)
# True if this Triton lays blocks of ``stream`` out as assumed in all shapes. The compiled code shows that 3.9
# does not for 4-bit weights of 4096 columns, though it does for the small ones of the trial.
STREAMS_KEEP_THEIR_LAYOUT = is_too_old(triton.__version__, "3.9")


@functools.cache
def layout_holds(device: torch.device, dtype: torch.dtype, bits: int) -> bool:
    """Tell whether Triton lays blocks out as ``mma`` assumes: small products of integers must be exact."""
    if device.type != "cuda":
        return True
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        weight = torch.randint(-128, 128, (32, 512 * bits // 8), dtype=torch.int8, generator=generator).to(device)
        x = torch.randint(-3, 4, (16, 512), generator=generator).to(device, dtype)
        scale, out = torch.ones(32, dtype=dtype, device=device), torch.empty(16, 32, dtype=dtype, device=device)
        integers = torch.stack((weight >> 4, (weight << 4) >> 4), -1).flatten(1) if bits == 4 else weight
        expected = (x.double() @ integers.double().T).to(dtype)
        arguments = (weight, scale, bits, -1, None, None, 1.0, False)
        launch_quantized_matmul(x, *arguments, out, Quantized(1, 2, 2))
        holds = torch.equal(out, expected)
        launch_quantized_stream(x[:8], *arguments, out[:8], Stream(1, 2, 2, 2, 1))
        holds = holds and torch.equal(out[:8], expected[:8])
        launch_quantized_row(x[:1], *arguments, out[:1], Row(2, 2, 2, 1))
        holds = holds and torch.equal(out[:1], expected[:1])
    if not holds:
        _logger.warning("This Triton lays registers out differently; quantised layers take a slower kernel.")
    return holds
