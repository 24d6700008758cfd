"""Add what transformers or our model use of torch's interface and OneFlow 0.9.0 lacks, each only if it is missing."""

import inspect
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

APPLIED: list[str] = []


class MissingType:
    """Stand-in for a dtype that OneFlow lacks: it can be a key of a table and equals no real dtype."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<torch.{self.name}, which OneFlow lacks>"


def apply(oneflow: ModuleType) -> None:
    """Add what is missing. Replace nothing that OneFlow has, except what a ``_mend`` function names."""
    tensor = oneflow.Tensor
    # Table keys of safetensors.torch.
    for name in ("int16", "complex64", "complex128"):
        _add(oneflow, name, MissingType(name))
    _add(oneflow, "inf", math.inf)
    _add(oneflow, "outer", lambda first, second: first[:, None] * second[None, :])
    _add(oneflow.nn.utils, "skip_init", skip_init)
    _add(tensor, "new", _new)
    _add(tensor, "data_ptr", _data_ptr)
    _add(tensor, "tril_", _in_place(oneflow.tril))
    _add(tensor, "unsqueeze_", _in_place(oneflow.unsqueeze))
    _add(tensor, "squeeze_", _in_place(oneflow.squeeze))
    _add(tensor, "nan_to_num_", _in_place(_nan_to_num))
    _add(tensor, "__lshift__", _shift_left)
    _add(tensor, "__rshift__", _shift_right)
    if not hasattr(oneflow, "strided"):
        _add(oneflow, "strided", "oneflow.strided")
        _add(tensor, "layout", property(lambda self: oneflow.strided))
    _add_fx(oneflow)
    _mend_bits(oneflow)
    _mend_scatter(oneflow)
    _mend_division(oneflow)


def _add(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        setattr(owner, name, value)
        APPLIED.append(f"{owner.__name__}.{name}")


def _add_fx(oneflow: ModuleType) -> None:
    """Add a torch.fx without proxies: transformers asks whether a tensor is one."""
    if "oneflow.fx" in sys.modules or find_spec("oneflow.fx") is not None:
        return
    module = ModuleType("oneflow.fx", "Stand-in for torch.fx, which OneFlow lacks.")
    module.Proxy = type("Proxy", (), {})
    sys.modules[module.__name__] = module
    _add(oneflow, "fx", module)


def skip_init(module_class: type, *args: Any, **kwargs: Any) -> Any:
    """Make a module with uninitialised parameters, as ``torch.nn.utils.skip_init`` does.

    ``dtype`` and ``device`` are applied afterwards if its class does not take them: OneFlow 0.9.0's Embedding and
    LayerNorm do not.
    """
    accepted = inspect.signature(module_class.__init__).parameters
    later = {name: kwargs.pop(name) for name in ("dtype", "device") if name in kwargs and name not in accepted}
    reset = module_class.__dict__.get("reset_parameters")
    try:
        if reset is not None:
            module_class.reset_parameters = lambda self: None
        module = module_class(*args, **kwargs)
    finally:
        if reset is not None:
            module_class.reset_parameters = reset
    later = {name: value for name, value in later.items() if value is not None}
    return module.to(**later) if later else module


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method that puts the result into the tensor itself; autograd does not pass it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.data = function(self, *args, **kwargs)
        return self

    return method


def _new(self: Any, *args: Any, device: Any = None) -> Any:
    import oneflow

    device = device or self.device
    if len(args) == 1 and isinstance(args[0], (list, tuple)) and not isinstance(args[0], oneflow.Size):
        return oneflow.tensor(args[0], dtype=self.dtype, device=device)
    return oneflow.empty(*(args or (0,)), dtype=self.dtype, device=device)


def _data_ptr(self: Any) -> int:
    """Return the address on the CPU, elsewhere a number that tells tensors apart: transformers needs no more."""
    return self.numpy().ctypes.data if self.device.type == "cpu" else id(self)


def _nan_to_num(tensor: Any, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    import oneflow

    limits = oneflow.finfo(tensor.dtype)
    tensor = oneflow.where(tensor.isnan(), oneflow.full_like(tensor, nan), tensor)
    return tensor.clamp(limits.min if neginf is None else neginf, limits.max if posinf is None else posinf)


def _shift_right(self: Any, count: int) -> Any:
    """Shift arithmetically, in float64 on the tensor's device: every step unpacks int4 weights with it."""
    return (self.double() / 2**count).floor().to(self.dtype)


def _shift_left(self: Any, count: int) -> Any:
    """Shift as torch does: bits that leave the dtype are lost."""
    span = 2.0 ** (8 * self.element_size())
    values = self.double() * 2**count
    return (values - ((values + span / 2) / span).floor() * span).to(self.dtype)


def _on_bits(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Make an operation on the bits of integers through numpy, which keeps the dtype as torch does."""

    def method(self: Any, other: Any) -> Any:
        import oneflow

        values = self.detach().cpu().numpy()
        other = other.detach().cpu().numpy() if isinstance(other, oneflow.Tensor) else values.dtype.type(other)
        return oneflow.from_numpy(np.ascontiguousarray(function(values, other))).to(self.device)

    return method


def _mend_bits(oneflow: ModuleType) -> None:
    """Mend 0.9.0, whose & and | of integers only tell whether they are not zero; torch's work on their bits."""
    if int(oneflow.tensor([6]) & oneflow.tensor([3])) == 2:
        return
    for name, function in {"__and__": np.bitwise_and, "__or__": np.bitwise_or}.items():
        _mend_operator(oneflow, name, _on_bits(function))


def _mend_operator(oneflow: ModuleType, name: str, on_integers: Callable[..., Any]) -> None:
    on_bools = getattr(oneflow.Tensor, name)

    def method(self: Any, other: Any) -> Any:
        return on_bools(self, other) if self.dtype == oneflow.bool else on_integers(self, other)

    setattr(oneflow.Tensor, name, method)
    APPLIED.append(f"Tensor.{name}")


def _mend_scatter(oneflow: ModuleType) -> None:
    """Mend 0.9.0, whose scatter without ``reduce`` asks its kernel for the reduction "", which does not exist."""
    reduce = inspect.signature(oneflow.Tensor.scatter).parameters.get("reduce")
    if reduce is None or reduce.default != "":
        return

    def scatter(self: Any, dim: int, index: Any, src: Any, *, reduce: str | None = None) -> Any:
        return oneflow._C.scatter(self, dim, index, src, reduce=reduce, inplace=False)

    oneflow.Tensor.scatter = scatter
    APPLIED.append("Tensor.scatter")


def _mend_division(oneflow: ModuleType) -> None:
    """Mend 0.9.0, whose div lacks ``rounding_mode``, which beam search of transformers 4.28 and later asks for."""
    try:
        oneflow.div(oneflow.ones(1), oneflow.ones(1), rounding_mode="floor")
        return
    except TypeError:
        divide = oneflow.div

    def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
        result = divide(input, other)
        if rounding_mode is None:
            return result
        result = oneflow.floor(result) if rounding_mode == "floor" else oneflow.trunc(result)
        is_integer = isinstance(input, oneflow.Tensor) and not input.is_floating_point()
        return result.to(input.dtype) if is_integer else result

    oneflow.div = div
    APPLIED.append("oneflow.div")
