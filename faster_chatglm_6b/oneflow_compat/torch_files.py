"""Load and save torch's .bin files without torch: zip archives of one pickle and raw storages.

OneFlow's own load imports real torch for them, and its save writes a directory. Only tensors, numbers, texts and plain
containers are read; a pickle that names anything else is refused.
"""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

# torch's storage classes, and numpy's names of their elements; bfloat16, which numpy lacks, is kept as its bits.
_ELEMENTS = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}


def install(oneflow: ModuleType) -> Callable[[], None]:
    """Replace ``load`` and ``save``, which still serve OneFlow's directories; return a function that undoes it."""
    own_load, own_save = oneflow.load, oneflow.save

    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(f, (str, os.PathLike)) and os.path.isfile(f):
            return load_file(f, args[0] if args else kwargs.get("map_location"))
        return own_load(f, *args, **kwargs)

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(obj, (dict, oneflow.Tensor)) and isinstance(f, (str, os.PathLike)) and not os.path.isdir(f):
            save_file(obj, f)
        else:
            own_save(obj, f, *args, **kwargs)

    oneflow.load, oneflow.save = load, save

    def undo() -> None:
        oneflow.load, oneflow.save = own_load, own_save

    return undo


def to_tensor(array: np.ndarray, is_bfloat16: bool = False) -> Any:
    """Make a OneFlow tensor of a numpy array, or of bfloat16 bits. int16, which OneFlow lacks, becomes int32."""
    import oneflow

    if is_bfloat16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if array.dtype == np.int16:
        array = array.astype(np.int32)
    tensor = oneflow.from_numpy(np.array(array, order="C", ndmin=1))
    tensor = tensor.reshape(array.shape) if array.ndim == 0 else tensor
    return tensor.to(oneflow.bfloat16) if is_bfloat16 else tensor


def to_array(tensor: Any) -> np.ndarray:
    """Make a contiguous numpy array of a OneFlow tensor; of bfloat16 take the bits."""
    import oneflow

    tensor = tensor.detach().cpu()
    if tensor.dtype == oneflow.bfloat16:
        return (tensor.float().numpy().view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(tensor.numpy()).reshape(tuple(tensor.shape))


def load_file(path: str | os.PathLike, map_location: Any = None) -> Any:
    """Load as ``torch.load`` does, with OneFlow's tensors, on the CPU or on the device ``map_location``.

    Raises:
        pickle.UnpicklingError: the file is no zip archive of torch's, is damaged, or names code to run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise pickle.UnpicklingError(f"{path} is a zip archive, but not one that torch.save wrote.")
            root = pickled[0].removesuffix("data.pkl")
            device = None if map_location is None or str(map_location) == "cpu" else map_location
            return _Unpickler(archive, root, device).load()
    except (zipfile.BadZipFile, KeyError) as error:
        raise pickle.UnpicklingError(
            f"{path} is damaged, or a file of torch before 1.6, which cannot be read here. ({error})"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, device: Any):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root, self._device = archive, root, device
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _ELEMENTS:
            return name
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"The file names {module}.{name}, which no checkpoint needs; it is not loaded."
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[np.ndarray, str]:
        _, kind, key, _location, _elements = pid
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _ELEMENTS[kind])
        return self._storages[key], kind

    def _rebuild_tensor(self, storage: tuple[np.ndarray, str], offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
        elements, kind = storage
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
        if offset < 0 or any(step < 0 for step in stride) or last >= max(len(elements), 1):
            raise pickle.UnpicklingError("A tensor of the file reaches past the end of its storage.")
        view = np.lib.stride_tricks.as_strided(
            elements[offset:], tuple(size), tuple(step * elements.itemsize for step in stride)
        )
        tensor = to_tensor(view, kind == "BFloat16Storage")
        return tensor if self._device is None else tensor.to(self._device)


def _rebuild_parameter(data: Any, requires_grad: bool, _hooks: Any) -> Any:
    import oneflow

    return oneflow.nn.Parameter(data, requires_grad)


class _Global:
    """An object that is written to the pickle as a name."""

    def __init__(self, module: str, name: str):
        self.reference = f"c{module}\n{name}\n".encode()


class _Storage:
    """An object that is written to the pickle as a reference to a raw file of the archive."""

    def __init__(self, pid: tuple):
        self.pid = pid


_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")


class _Pickler(pickle._Pickler):
    """Python's own pickler: its ``save`` can be extended by objects that have no module to import."""

    def __init__(self, file: Any, storage_of: dict[Any, str]):
        super().__init__(file, protocol=2)
        self._storage_of = storage_of
        self.records: list[np.ndarray] = []
        self._places: dict[tuple, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _Storage) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        import oneflow

        if isinstance(obj, _Global):
            self.write(obj.reference)
        elif isinstance(obj, oneflow.Tensor):
            self._save_tensor(obj)
        else:
            super().save(obj, save_persistent_id)

    def _save_tensor(self, tensor: Any) -> None:
        array = to_array(tensor)
        kind = _Global("torch", self._storage_of[tensor.dtype])
        # Tied weights share one storage.
        place = (array.ctypes.data, array.nbytes, array.dtype.str)
        if place not in self._places:
            self._places[place] = len(self.records)
            self.records.append(array)
        storage = _Storage(("storage", kind, str(self._places[place]), "cpu", array.size))
        stride = tuple(step // array.itemsize for step in array.strides)
        self.save(_REBUILD_TENSOR)
        self.save((storage, 0, tuple(array.shape), stride, False, OrderedDict()))
        self.write(pickle.REDUCE)


def save_file(obj: Any, path: str | os.PathLike) -> None:
    """Write a tensor or a dict of tensors as ``torch.save`` does; torch reads it, also with ``weights_only``."""
    import oneflow

    storage_of = {
        oneflow.float32: "FloatStorage",
        oneflow.float64: "DoubleStorage",
        oneflow.float16: "HalfStorage",
        oneflow.bfloat16: "BFloat16Storage",
        oneflow.int64: "LongStorage",
        oneflow.int32: "IntStorage",
        oneflow.int8: "CharStorage",
        oneflow.uint8: "ByteStorage",
        oneflow.bool: "BoolStorage",
    }
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, storage_of)
    pickler.dump(obj)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for index, array in enumerate(pickler.records):
            archive.writestr(f"archive/data/{index}", array.tobytes())
        archive.writestr("archive/version", "3\n")
