"""Answer imports of a served checkpoint's own files: ``transformers_modules.<checkpoint>.modeling_chatglm`` is ours.

transformers copies a checkpoint's code there, and scripts import names from it. Nothing is copied of a checkpoint that
was served. This finder stands last on the import path: files that lie there from earlier are found before it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import report

_TOP = "transformers_modules"
# A checkpoint's file -> our module with the names that scripts import from it.
_FILES = {
    "modeling_chatglm": "modeling_chatglm",
    "configuration_chatglm": "configuration_chatglm",
    "tokenization_chatglm": "tokenization_chatglm",
    "quantization": "layers.quantized",
}
_REVISION = re.compile(r"[0-9a-f]{7,64}|main")
# transformers writes so what cannot stand in the name of a module.
_WRITTEN = re.compile(r"_hyphen_|_dot_|[-_.]")


class HubModuleFinder:
    """Meta-path finder of the files, and of the packages around them, of checkpoints that were served."""

    def __init__(self) -> None:
        self._made: list[str] = []

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a served checkpoint's file or of a package around it, else None."""
        top, *parts = fullname.split(".")
        if top != _TOP:
            return None
        served = _served_packages()
        if parts and parts[-1] in _FILES:
            return self._spec(fullname) if any(_is_within(served_as, parts[:-1]) for served_as in served) else None
        if not served or not any(_leads_to(served_as, parts) for served_as in served):
            return None
        spec = self._spec(fullname)
        # Files that other checkpoints put there later are found beside ours.
        spec.submodule_search_locations = [os.path.join(folder, *fullname.split(".")) for folder in _cache_folders()]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: Python makes an empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Put our module in the place of a file; a package stays empty."""
        name = module.__name__
        self._made.append(name)
        file = name.rpartition(".")[2]
        if file in _FILES:
            sys.modules[name] = importlib.import_module(f"{__package__}.{_FILES[file]}")

    def forget(self) -> None:
        """Remove the modules that were made from ``sys.modules`` and from the packages above them."""
        for name in self._made:
            module = sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            if module is not None and vars(sys.modules.get(parent, sys)).get(child) is module:
                delattr(sys.modules[parent], child)
        self._made.clear()

    def _spec(self, fullname: str) -> ModuleSpec:
        return ModuleSpec(fullname, self, origin="faster_chatglm_6b")


def _served_packages() -> list[list[str]]:
    """Name the served checkpoints' packages as transformers would: a directory's name, or owner and name."""
    names = []
    for name in report.served_names():
        is_folder = os.path.isdir(name) or name.count("/") != 1
        parts = [os.path.basename(os.path.normpath(name))] if is_folder else name.split("/")
        names.append([_plain(part) for part in parts])
    return names


def _is_within(served: list[str], parts: list[str]) -> bool:
    """Return whether the package is the checkpoint's: by its name, and perhaps by a revision below it."""
    plain = [_plain(part) for part in parts]
    revision = plain[len(served) :]
    return plain[: len(served)] == served and (not revision or bool(_REVISION.fullmatch(".".join(revision))))


def _leads_to(served: list[str], parts: list[str]) -> bool:
    plain = [_plain(part) for part in parts]
    return plain == served[: len(plain)] or _is_within(served, parts)


def _plain(part: str) -> str:
    return _WRITTEN.sub("", part).lower()


def _cache_folders() -> list[str]:
    cache = getattr(sys.modules.get("transformers.dynamic_module_utils"), "HF_MODULES_CACHE", None)
    return [str(cache)] if cache else []
