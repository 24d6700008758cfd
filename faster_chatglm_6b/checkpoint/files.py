"""The tensors in a checkpoint's weight files: which they are, and whether they can be a model at all.

transformers casts whatever it finds to the model's dtype, and warns at most of names that it does not know. Integers
without their scales, for example, would so become a model that talks nonsense.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open

from ..disk.bin_files import check_bin
from .agreement import Held
from .errors import DamagedFile

# The files' names for torch's dtypes.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


def tensors_of_file(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of everything in a weight file, mapped into memory and read when it is used.

    Raises:
        DamagedFile: the file cannot be read as weights.
    """
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 safe_open is no mapping
                yield name, file.get_tensor(name)
        return
    try:
        size = os.path.getsize(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=check_bin(path, size))
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in content.items()):
            raise TypeError("it is no dictionary of tensors")
        _check_tensors(content, size)
    except Exception as error:
        # Its pickle may be torn anywhere, and torch's reader then fails in any way.
        raise DamagedFile(str(error) or type(error).__name__) from error
    yield from content.items()


def _check_tensors(content: dict[str, torch.Tensor], size: int) -> None:
    """Refuse tensors that are larger than the file's bytes: they would take memory when they are used."""
    if not has_meta_device():
        return  # such a framework has no such tensors either
    total = 0
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise TypeError(f"{name} is no plain tensor")
        held = tensor.numel() * tensor.element_size()
        # In most checkpoints the head is the embedding, whose bytes are there only once.
        total += 0 if name == "lm_head.weight" else held
        if held > tensor.untyped_storage().nbytes() or total > size:
            raise ValueError(f"{name} has {tensor.numel()} numbers, but the file has {size} bytes only")


def contents(files: dict[str, set[str]], name: Any) -> dict[str, Held]:
    """Describe what the files hold, by name. Of the content, only scales are read.

    Args:
        files: with the tensors that an index says are in each.
        name: of the checkpoint, for the messages.

    Raises:
        DamagedFile, SafetensorError: a file cannot be read as weights.
        ValueError: tensors that are not where the index says, or that two files hold, or scales that are no numbers.
    """
    held: dict[str, Held] = {}
    for path, promised in files.items():
        found: dict[str, Held] = {}
        for key, one, scale in _described(path):
            found[key] = one
            if scale is not None and not bool(torch.isfinite(scale).all()):
                raise ValueError(
                    f"The weights of {name} hold scales that are not finite in {key}; copy or download them again."
                )
        missing, twice = promised - found.keys(), held.keys() & found.keys()
        if missing:
            raise ValueError(
                f"The index of {name} says that {os.path.basename(path)} holds {min(missing)}, but it does not; copy "
                "or download both again."
            )
        if twice:
            raise ValueError(
                f"Two weight files of {name} hold {min(twice)}, {os.path.basename(path)} being one of them; copy or "
                "download them again."
            )
        held |= found
    return held


def _described(path: str) -> Iterator[tuple[str, Held, torch.Tensor | None]]:
    """Yield (name, description, the tensor itself if it is a scale) of everything in a weight file."""
    if not path.endswith(".safetensors"):
        for key, tensor in tensors_of_file(path):
            yield key, Held(tensor.dtype, tuple(tensor.shape)), tensor if key.endswith(".weight_scale") else None
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 safe_open is no mapping
            part = file.get_slice(key)
            dtype = _DTYPES.get(part.get_dtype(), getattr(torch, _long_name(part.get_dtype()), part.get_dtype()))
            scale = file.get_tensor(key) if key.endswith(".weight_scale") else None
            yield key, Held(dtype, tuple(part.get_shape())), scale


def _long_name(dtype: str) -> str:
    return dtype.replace("U", "uint").replace("I", "int").lower()


def has_meta_device() -> bool:
    """Return whether the framework has tensors without content, so that a model takes no memory to be compared."""
    try:
        torch.empty(0, device="meta")
    except RuntimeError:
        return False
    return True
