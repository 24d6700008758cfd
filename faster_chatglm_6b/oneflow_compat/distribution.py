"""Answer transformers, which asks importlib.metadata for the installed torch, if there is none."""

import importlib.metadata as metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

# The release whose interface OneFlow's mock follows.
TORCH_INTERFACE = "1.13.1"


class _Distribution(metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            return f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH_INTERFACE}\n"
        return None

    def locate_file(self, path: Any) -> Any:
        return path


class _Finder(metadata.DistributionFinder):
    """The last finder on the import path, so that a real torch is found first; finds no modules."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        if context is not None and context.name == "torch":
            yield _Distribution()


def answer_for_torch() -> Callable[[], None]:
    """Answer for the distribution "torch" unless it is installed; return a function that undoes it."""
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        finder = _Finder()
        sys.meta_path.append(finder)
        return lambda: sys.meta_path.remove(finder)
    return lambda: None
