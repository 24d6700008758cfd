"""Switch OneFlow's mock of torch on and off, and mend that of 0.9.0."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

_MENDED_MARK = "__faster_chatglm_6b_mended__"


class _Shelf:
    """Modules put aside until "torch" means again what it meant when they were imported."""

    def __init__(self) -> None:
        self.with_oneflow: dict[str, ModuleType] = {}
        self.with_torch: dict[str, ModuleType] = {}
        self.at_last_switch: set[str] = set()


_shelf = _Shelf()


def enable(oneflow: ModuleType) -> Callable[[], None]:
    """Switch the mock on; return a function that switches it off and gives real torch back.

    The mock is lazy only if ``ONEFLOW_MOCK_TORCH_LAZY`` says so: a lazy one invents objects for everything that OneFlow
    lacks, and calls of them do nothing.
    """
    mock = oneflow.mock_torch
    if "lazy" in inspect.signature(mock.enable.__init__).parameters:
        # This generation of the mock puts modules aside by itself.
        handle = mock.enable()
        return lambda: handle.__exit__(None, None, None)
    _mend(mock, oneflow)
    roots = {name.split(".")[0] for name in _shelf.with_oneflow}
    _shelf.with_torch = _take(name for name in _since_last_switch() if name.split(".")[0] in roots)
    sys.modules.update(_shelf.with_oneflow)
    _shelf.at_last_switch = set(sys.modules) - set(_shelf.with_oneflow)
    handle = mock.enable()

    def switch_off() -> None:
        bound = _bound_to(mock.ModuleWrapper)
        handle.__exit__(None, None, None)
        _shelf.with_oneflow = _take(bound)
        sys.modules.update(_shelf.with_torch)
        _shelf.at_last_switch = set(sys.modules) - set(_shelf.with_torch)

    return switch_off


def _take(names: Iterable[str]) -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(names)}


def _since_last_switch() -> list[str]:
    """List modules imported since the last switch, except extension modules: most cannot be loaded twice."""
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in _shelf.at_last_switch
        and name.split(".")[0] not in ("oneflow", "torch")
        and isinstance(getattr(getattr(module, "__spec__", None), "loader", None), SourceFileLoader)
    ]


def _bound_to(wrapper: type) -> list[str]:
    """List modules imported since the last switch, of packages that hold the mock's modules in a variable."""
    since = _since_last_switch()
    packages = {
        name.split(".")[0]
        for name in since
        if any(isinstance(value, wrapper) for value in list(vars(sys.modules[name]).values()))
    }
    return [name for name in since if name.split(".")[0] in packages]


def _mend(mock: ModuleType, oneflow: ModuleType) -> None:
    """Mend 0.9.0: raise what Python expects for a missing attribute or module, and keep attributes that are set."""
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
