"""Tell why the Triton kernels cannot serve a device and dtype, without importing them."""

import functools
import importlib.util
import os

import torch

from ..versions import installed_version, is_too_old

OLDEST_CAPABILITY = (8, 0)
# Older ones lack the instructions by which a kernel starts the next one, or cannot call them.
OLDEST_TRITON = "3.5"
SWITCH = "FASTER_CHATGLM_6B_KERNELS"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def switch_refusal() -> str | None:
    """Say why the user wants the definitions alone, on any device; None if the switch is not set to off."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0"):
        return f"{SWITCH}={os.environ[SWITCH]}"
    return None


@functools.cache
def kernels_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the Triton kernels cannot serve this device and dtype; None if they can.

    A CPU passes only in Triton's interpreter (``TRITON_INTERPRET=1``), which is for tests. Users turn off the kernels,
    and with them the captured loop, by ``FASTER_CHATGLM_6B_KERNELS=off``.
    """
    if switch_refusal() is not None:
        return switch_refusal()
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and not interpreted):
        return f"there are no fused kernels for {device.type}; PyTorch's own serve it"
    if dtype not in DTYPES:
        return f"there are no fused kernels for {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with `pip install triton`"
    version = installed_version("triton")
    if version is not None and is_too_old(version, OLDEST_TRITON):
        return (
            f"Triton {version} is too old for the fused kernels, which need {OLDEST_TRITON} or newer; "
            "torch 2.9 and later bring one"
        )
    if device.type == "cpu":
        return None
    if interpreted:
        return "TRITON_INTERPRET=1 makes Triton interpret its kernels"
    if torch.version.hip is not None:
        return "the fused kernels are made for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is needed"
    return _trial(device)


def _trial(device: torch.device) -> str | None:
    """Compile and run the smallest kernel and say why it fails: Triton needs a C compiler and a driver it knows."""
    try:
        from . import triton as kernels

        with torch.cuda.device(device):
            kernels.fast_gelu(torch.zeros(16, dtype=torch.float16, device=device))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton does not work here: {lines[-1][:200]}"
    return None
