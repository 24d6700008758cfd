"""OneFlow's mock of torch: switched on and off, and mended where it is the one of 0.9.0."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

_MENDED_MARK = "__faster_chatglm_6b_mended__"
# Modules that were imported while torch was OneFlow, and wait for it to be so again.
_set_aside: dict[str, ModuleType] = {}


def enable(oneflow: ModuleType) -> Callable[[], None]:
    """Switch the mock on; returns what switches it off and gives real torch back.

    It is not lazy unless ``ONEFLOW_MOCK_TORCH_LAZY`` says so: a lazy mock invents objects for everything that OneFlow
    lacks, and calls of them do nothing.
    """
    mock = oneflow.mock_torch
    sets_modules_aside = "lazy" in inspect.signature(mock.enable.__init__).parameters
    if sets_modules_aside:
        handle = mock.enable()
        return lambda: handle.__exit__(None, None, None)
    _mend(mock, oneflow)
    sys.modules.update(_set_aside)
    _set_aside.clear()
    before = set(sys.modules)
    handle = mock.enable()

    def switch_off() -> None:
        bound = _bound_to(mock.ModuleWrapper, before)
        handle.__exit__(None, None, None)
        for name in bound:
            _set_aside[name] = sys.modules.pop(name)

    return switch_off


def _bound_to(wrapper: type, before: set[str]) -> list[str]:
    """Modules of source code that were imported since, of packages that hold the mock's modules in a variable.

    Later mocks take away everything imported since. Extension modules stay: most cannot be loaded twice.
    """
    since = {
        name: module
        for name, module in list(sys.modules.items())
        if name not in before and isinstance(module, ModuleType) and name.split(".")[0] not in ("oneflow", "torch")
    }
    packages = {
        name.split(".")[0]
        for name, module in since.items()
        if any(isinstance(value, wrapper) for value in list(vars(module).values()))
    }
    return [
        name
        for name, module in since.items()
        if name.split(".")[0] in packages
        and isinstance(getattr(getattr(module, "__spec__", None), "loader", None), SourceFileLoader)
    ]


def _mend(mock: ModuleType, oneflow: ModuleType) -> None:
    """0.9.0: a missing attribute or module raises what Python expects, and attributes that are set stay."""
    wrapper, importer = mock.ModuleWrapper, mock.OneflowImporter
    if hasattr(wrapper, _MENDED_MARK):
        return

    def get_attribute(self: Any, name: str) -> Any:
        module = self.__dict__["module"]
        try:
            value = getattr(module, name)
        except AttributeError:
            if name == "__path__":
                return None
            if name == "__all__":
                return [public for public in dir(module) if not public.startswith("_")]
            raise AttributeError(f"OneFlow {oneflow.__version__} has no {module.__name__}.{name}") from None
        return wrapper(value) if inspect.ismodule(value) else value

    def set_attribute(self: Any, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "module" and not name.startswith("__"):
            setattr(self.__dict__["module"], name, value)

    create = importer.create_module

    def create_module(self: Any, spec: Any) -> Any:
        name = "oneflow" + spec.name.removeprefix("torch")
        if self.enable and spec.name not in self.enable_mod_cache and name not in sys.modules and not _exists(name):
            raise ModuleNotFoundError(f"OneFlow {oneflow.__version__} has no module {name}", name=spec.name)
        try:
            return create(self, spec)
        finally:
            self.in_create_module = False

    wrapper.__getattr__, wrapper.__setattr__ = get_attribute, set_attribute
    importer.create_module = create_module
    setattr(wrapper, _MENDED_MARK, True)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
