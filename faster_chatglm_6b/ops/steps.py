"""Choose the kernels of the captured loop's steps, once per device: Triton's on a GPU, C and PyTorch's on a CPU."""

import functools
import os
from types import ModuleType

import torch

from .. import backend
from .availability import DTYPES, kernels_refusal, switch_refusal


def steps_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why no kernels of the loop's steps serve this device and dtype; None if ``step_kernels`` has them."""
    if not _is_served_by_cpu(device):
        return kernels_refusal(device, dtype)
    if backend.is_oneflow():
        return "OneFlow has operators of its own"
    if switch_refusal() is None and dtype not in DTYPES:
        return f"there are no fused kernels for {str(dtype).removeprefix('torch.')}"
    return switch_refusal()


def step_kernels(device: torch.device) -> ModuleType:
    """Return the module of the kernels for a device that ``steps_refusal`` does not refuse; all have the same names.

    ``CAPTURES`` there tells whether CUDA graphs may hold them. In Triton's interpreter, which is for tests, a CPU gets
    Triton's kernels.
    """
    return _load(_is_served_by_cpu(device))


def _is_served_by_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1"


@functools.cache
def _load(cpu: bool) -> ModuleType:
    # Not at the top: Triton may be missing, and PyTorch's names are not OneFlow's.
    if cpu:
        from .cpu import steps

        return steps
    from . import triton

    return triton
