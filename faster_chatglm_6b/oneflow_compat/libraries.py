"""Load the CUDA libraries that pip installed beside OneFlow, whose wheel expects the loader to find them."""

import ctypes
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

# In the order in which they need each other. cuDNN's parts are opened by name at run time.
_LIBRARIES = {
    "nvidia-cuda-runtime-cu11": ("libcudart.so.11.0",),
    "nvidia-cublas-cu11": ("libcublasLt.so.11", "libcublas.so.11"),
    "nvidia-cudnn-cu11": (
        "libcudnn.so.8",
        "libcudnn_ops_infer.so.8",
        "libcudnn_cnn_infer.so.8",
        "libcudnn_adv_infer.so.8",
    ),
}


def preload_cuda_libraries() -> list[str]:
    """Load the libraries of CUDA 11 that are installed as Python packages; return their names.

    If there are none (CUDA installed system-wide, another CUDA), do nothing: OneFlow looks for itself.
    """
    loaded = []
    for package, names in _LIBRARIES.items():
        for path in _files_of(package, names):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            loaded.append(path.name)
    return loaded


def _files_of(package: str, names: tuple[str, ...]) -> Iterator[Path]:
    try:
        found = {Path(str(file)).name: file for file in files(package) or ()}
    except PackageNotFoundError:
        return
    for name in names:
        if name in found:
            yield Path(str(found[name].locate()))
