"""Find the devices on which accelerate's ``device_map`` has modules compute; their weights may lie elsewhere."""

from typing import Any

import torch

_CPU = torch.device("cpu")


def execution_device(module: Any, default: torch.device) -> torch.device:
    """Return the device to which accelerate's hook moves a module's inputs; ``default`` if it has no such hook."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return default


def input_device(model: Any, default: torch.device = _CPU) -> torch.device:
    """Return the device on which a model wants its ids.

    accelerate's ``cpu_offload`` leaves the weights on ``meta`` and puts the hooks on the parts.

    Args:
        default: returned if the weights are on no device and no hook says where they go.
    """
    embedding = model.get_input_embeddings()
    own = model.device if model.device.type != "meta" else default
    return execution_device(model, execution_device(embedding, own))


def spread_over(model: Any) -> str | None:
    """Return the places that ``device_map`` gave a model; None for a model on one device."""
    device_map = getattr(model, "hf_device_map", None) or {}
    places = sorted({f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()})
    return ", ".join(places) if len(places) > 1 or "disk" in places else None
