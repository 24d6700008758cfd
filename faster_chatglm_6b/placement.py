"""Where accelerate's ``device_map`` has a module compute, which need not be where its weights lie."""

from typing import Any

import torch


def execution_device(module: Any, default: torch.device) -> torch.device:
    """The device that accelerate's hook moves a module's inputs to; ``default`` where it has no such hook."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return default


def spread_over(model: Any) -> str | None:
    """The places that ``device_map`` gave a model where they are more than one device; None for a model on one."""
    device_map = getattr(model, "hf_device_map", None) or {}
    places = sorted({f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()})
    return ", ".join(places) if len(places) > 1 or "disk" in places else None
