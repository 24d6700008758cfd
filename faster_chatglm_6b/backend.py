"""Which framework runs the model: decided once, at import, with the reason; and which versions of it we can serve.

Nothing here imports torch, transformers or OneFlow: modules are looked up, not loaded.
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

BACKEND_VARIABLE = "FASTER_CHATGLM_6B_BACKEND"
BACKENDS = ("auto", "torch", "oneflow")

# 4.45 is the oldest release whose cache and mask interfaces the model is tested with.
OLDEST_TRANSFORMERS = "4.45"
# 2.4 is the oldest release that transformers 5 works with. Checkpoints of .bin shards need 2.6, whose torch.load is
# safe with untrusted files: transformers itself refuses to read them with less. Safetensors are not concerned.
OLDEST_TORCH = "2.4"


class Backend(NamedTuple):
    """The chosen framework, ``"torch"`` (the only one so far), and why it was chosen."""

    name: str
    reason: str


def choose_backend(environment: Mapping[str, str] = os.environ) -> Backend:
    """Chooses the framework from ``FASTER_CHATGLM_6B_BACKEND`` (``auto`` if unset) and from what is installed.

    ``auto`` never raises: without PyTorch, the import succeeds and loading a model says what is missing.

    Raises:
        ValueError: the variable holds something else than ``auto``, ``torch`` or ``oneflow``.
        ImportError: the framework that the variable asks for is not available.
    """
    wanted = environment.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
    if wanted not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}={environment[BACKEND_VARIABLE]!r} is not a backend; "
            f"set it to one of {', '.join(BACKENDS)}, or unset it."
        )
    has_torch, has_oneflow = _is_installed("torch"), _is_installed("oneflow")
    if wanted == "oneflow":
        raise ImportError(_why_oneflow_is_unavailable(has_oneflow))
    if wanted == "torch":
        if not has_torch:
            raise ImportError(
                f"{BACKEND_VARIABLE}=torch asks for PyTorch, which is not installed; "
                f"install it with `pip install 'torch>={OLDEST_TORCH}'`."
            )
        return Backend("torch", f"{BACKEND_VARIABLE}=torch")
    if not has_torch:
        return Backend("torch", "auto: neither framework can serve yet, PyTorch is not installed")
    if has_oneflow:
        return Backend("torch", "auto: PyTorch is installed; OneFlow is too, but this version has no OneFlow backend")
    return Backend("torch", "auto: PyTorch is installed and OneFlow is not")


def require_transformers() -> None:
    """Raises ImportError unless the installed transformers is one that we can serve a checkpoint with."""
    _require("transformers", OLDEST_TRANSFORMERS)


def require_torch() -> None:
    """Raises ImportError unless the installed PyTorch is one that we can run a model with."""
    _require("torch", OLDEST_TORCH)


def installed_version(package: str) -> str | None:
    """The version of ``package``, from the loaded module or from its metadata; ``None`` if it is not installed."""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    # Imported here: it takes 20 ms, and `import faster_chatglm_6b` must stay light.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_too_old(version: str, oldest: str) -> bool:
    """Whether ``version`` precedes ``oldest`` ("4.45"); development and local versions count as their release."""
    return _release(version) < _release(oldest)


def _release(version: str) -> tuple[int, ...]:
    """(4, 45, 2) of "4.45.2", (2, 13, 0) of "2.13.0a0+git1": the leading numbers are all that the floors compare."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _require(package: str, oldest: str) -> None:
    found = installed_version(package)
    if found is None:
        raise ImportError(
            f"faster_chatglm_6b needs {package} {oldest} or newer to load a ChatGLM-6B checkpoint and found none; "
            f"install it with `pip install '{package}>={oldest}'`."
        )
    if is_too_old(found, oldest):
        raise ImportError(
            f"faster_chatglm_6b needs {package} {oldest} or newer to load a ChatGLM-6B checkpoint and found {found}; "
            f"upgrade it with `pip install -U '{package}>={oldest}'`."
        )


def _is_installed(package: str) -> bool:
    if package in sys.modules:  # find_spec raises for a loaded module without a spec, as test doubles are
        return sys.modules[package] is not None
    return find_spec(package) is not None


def _why_oneflow_is_unavailable(is_installed: bool) -> str:
    remedy = f"unset {BACKEND_VARIABLE} or set it to torch to run on PyTorch"
    if is_installed:
        return (
            f"{BACKEND_VARIABLE}=oneflow asks for OneFlow, which is installed, "
            f"but this version of faster_chatglm_6b has no OneFlow backend yet; {remedy}."
        )
    return (
        f"{BACKEND_VARIABLE}=oneflow asks for OneFlow, which is not installed, and this version of faster_chatglm_6b "
        f"has no OneFlow backend yet; {remedy}."
    )
