"""Trials of the products in the shapes that run: a kernel whose product is wrong on this machine is left out.

The kernels' PTX assumes how Triton lays registers out, which a release or a GPU may do otherwise for some blocks. So a
kernel's first call with a weight's shape and a configuration is preceded by one of the same compiled code, with numbers
whose product is known. That is before a graph is captured, since every step runs once before its capture.
"""

from collections.abc import Callable

import torch
from triton.runtime.errors import OutOfResources

from .... import report
from ...reference import fast_gelu

# Launches a kernel: x [M, K], weight, scale, bias, residual, out [M, N].
Launch = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor], object
]
# Weight rows at each end, and as many spread between, whose products are compared.
_COMPARED = 32
# Sums of integers times -1, 0 or 1 are scaled by this, so that 16384 of them fit into a half.
_SCALE = 2.0**-7
_holds: dict[tuple, bool] = {}


def holds(
    name: str,
    config: object,
    launch: Launch,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gelu: bool = False,
    normalises: bool = False,
) -> bool:
    """Tell whether kernel ``name`` multiplies rightly as it will be launched; the first call of a kind tries it.

    Args:
        config: its block shapes. launch: launches it on other x, scale, bias, residual and out of the same shapes.
        x, weight, scale, bias, residual: of the product to come; of all but ``weight`` only shape and dtype count.
        normalises: x is normalised first, with gamma 1 and beta 0.

    Returns:
        True without a GPU and during a capture, where nothing can be tried.
    """
    if x.device.type != "cuda":
        return True
    flags = bias is None, residual is None, gelu, normalises
    key = (name, config, x.device, x.dtype, scale.dtype, bits, group_size, weight.shape, flags)
    held = _holds.get(key)
    if held is None:
        if torch.cuda.is_current_stream_capturing():
            return True
        flaw = find_flaw(launch, x, weight, scale, bits, bias, residual, gelu, normalises)
        held = _holds[key] = flaw is None
        if not held:
            shape = f"[{weight.shape[0]}, {x.shape[1]}]"
            report.record_notice(
                f"The {name} kernel of int{bits} weights is left out for weights {shape} in {x.dtype} on "
                f"{torch.cuda.get_device_name(x.device)}: {flaw}. Another one takes its place."
            )
    return held


def find_flaw(
    launch: Launch,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gelu: bool,
    normalises: bool,
) -> str | None:
    """Launch the kernel on small integers; return what is wrong, or None. Arguments as of ``holds``."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        numbers = torch.randint(-1, 2, x.shape, generator=generator).to(x.device, x.dtype)
        scales = torch.full_like(scale, _SCALE)
        zeros = None if bias is None else torch.zeros_like(bias)
        nothing = None if residual is None else torch.zeros_like(residual)
        out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
        try:
            launch(numbers, weight, scales, zeros, nothing, out)
        except OutOfResources as error:
            return f"it does not fit ({error})"
        n = weight.shape[0]
        spread = torch.linspace(0, n - 1, _COMPARED, dtype=torch.float64).long()
        rows = torch.cat((torch.arange(min(_COMPARED, n)), spread, torch.arange(max(n - _COMPARED, 0), n)))
        rows = rows.to(x.device)
        stored = weight[rows]
        integers = torch.stack((stored >> 4, (stored << 4) >> 4), -1).flatten(1) if bits == 4 else stored
        if normalises:
            numbers = torch.nn.functional.layer_norm(numbers.double(), x.shape[-1:]).to(x.dtype)
        expected = numbers.double() @ integers.double().T * _SCALE
        if gelu:
            expected = fast_gelu(expected)
        found = out[:, rows].double()
        # A wrong layout exchanges terms of the sums, so errors are as large as the sums.
        error, size = float((found - expected).abs().max()), float(expected.abs().max())
        # Not as `error > bound`, which NaN is not.
        return None if error <= 0.02 * size else f"its product is off by {error:.3g}, where {size:.3g} is the largest"
