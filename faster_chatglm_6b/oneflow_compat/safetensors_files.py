"""Read and write safetensors for OneFlow: the library's part for torch needs functions that OneFlow lacks."""

import json
import os
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .torch_files import to_array, to_tensor

_ELEMENTS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}


class SafeOpen:
    """``safetensors.safe_open`` for OneFlow's tensors: a mapped file, read tensor by tensor.

    Raises:
        safetensors.SafetensorError: the file is truncated or corrupt.
    """

    def __init__(self, filename: str | os.PathLike, framework: str = "pt", device: Any = "cpu"):
        self._path, self._device = filename, None if str(device) == "cpu" else device
        try:
            self._bytes = np.memmap(filename, np.uint8, mode="r")
            (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
            self._header = json.loads(self._bytes[8 : 8 + length].tobytes())
            self._start = 8 + length
            ends = [entry["data_offsets"][1] for name, entry in self._header.items() if name != "__metadata__"]
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise _damaged(filename, error) from error
        if len(self._bytes) < self._start + max(ends, default=0):
            raise _damaged(filename, "it ends before its last tensor")

    def __enter__(self) -> "SafeOpen":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bytes = None

    def metadata(self) -> dict[str, str] | None:
        """Return the texts that the file carries beside its tensors, or None."""
        return self._header.get("__metadata__")

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return [name for name in self._header if name != "__metadata__"]

    def get_tensor(self, name: str) -> Any:
        """Read one tensor, onto the device that was asked for."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        try:
            raw = self._bytes[self._start + begin : self._start + end].view(_ELEMENTS[entry["dtype"]])
            tensor = to_tensor(raw.reshape(entry["shape"]), entry["dtype"] == "BF16")
        except (ValueError, KeyError) as error:
            raise _damaged(self._path, error) from error
        return tensor if self._device is None else tensor.to(self._device)


def load_file(filename: str | os.PathLike, device: Any = "cpu") -> dict[str, Any]:
    """Read all tensors of a file by name."""
    with SafeOpen(filename, device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 SafeOpen is no mapping


def save_file(tensors: dict[str, Any], filename: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name, each aligned to its element: the widest first, those of one width by name."""
    names = _names()
    widths = {name: np.dtype(_ELEMENTS[names[tensor.dtype]]).itemsize for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    arrays, offset = [], 0
    for name in sorted(tensors, key=lambda name: (-widths[name], name)):
        tensor = tensors[name]
        array = to_array(tensor)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        arrays.append(array)
        offset += array.nbytes
    _write(filename, header, arrays)


def _write(filename: str | os.PathLike, header: dict[str, Any], arrays: Iterable[np.ndarray]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(filename, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(array.tobytes())


def _names() -> dict[Any, str]:
    import oneflow

    return {
        oneflow.float64: "F64",
        oneflow.float32: "F32",
        oneflow.float16: "F16",
        oneflow.bfloat16: "BF16",
        oneflow.int64: "I64",
        oneflow.int32: "I32",
        oneflow.int8: "I8",
        oneflow.uint8: "U8",
        oneflow.bool: "BOOL",
    }


def _damaged(filename: Any, reason: Any) -> Exception:
    from safetensors import SafetensorError

    return SafetensorError(f"{filename} is truncated or corrupt ({reason})")


def install() -> Callable[[], None]:
    """Replace the library's functions for torch by these; return a function that undoes it."""
    import safetensors
    import safetensors.torch

    places = {
        (safetensors, "safe_open"): _open_for(safetensors.safe_open),
        (safetensors.torch, "load_file"): load_file,
        (safetensors.torch, "save_file"): save_file,
    }
    before = {place: getattr(*place) for place in places}
    for (module, name), function in places.items():
        setattr(module, name, function)

    def undo() -> None:
        for (module, name), function in before.items():
            setattr(module, name, function)

    return undo


def _open_for(original: Any) -> Callable[..., Any]:
    def safe_open(filename: Any, framework: str, device: Any = "cpu", **kwargs: Any) -> Any:
        """Open a file; for frameworks other than torch, with the library's own function."""
        if framework not in ("pt", "torch", "pytorch"):
            return original(filename, framework=framework, device=device, **kwargs)
        return SafeOpen(filename, framework, device)

    return safe_open
