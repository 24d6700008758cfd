"""Choose the framework that runs the model, once, at import, with the reason; and say which versions can serve.

Nothing here imports torch or transformers: modules are looked up, not loaded. OneFlow is loaded if it is chosen, or if
the choice depends on the GPU.
"""

import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from . import oneflow_compat, versions

BACKEND_VARIABLE = "FASTER_CHATGLM_6B_BACKEND"
BACKENDS = ("auto", "torch", "oneflow")

# 4.45 is the oldest release whose cache and mask interfaces the model is tested with.
OLDEST_TRANSFORMERS = "4.45"
# The newest release on which the whole test suite ran. Newer ones are served too, and status() names them.
NEWEST_TESTED_TRANSFORMERS = "5.24.0"
# 2.4 is the oldest release that transformers 5 works with. Checkpoints of .bin shards need 2.6, whose torch.load is
# safe with untrusted files: transformers itself refuses them with an older one. Safetensors do not need it.
OLDEST_TORCH = "2.4"
# Later releases ask for more of torch than OneFlow's mock has; earlier ones lack what the checkpoints need.
OLDEST_TRANSFORMERS_ON_ONEFLOW, FIRST_TRANSFORMERS_BEYOND_ONEFLOW = "4.27.1", "4.30"
# Releases before it lack five of the eight fused operators.
FIRST_FUSED_ONEFLOW = "0.9.1"


class Backend(NamedTuple):
    """The chosen framework, ``"torch"`` or ``"oneflow"``, and why it was chosen."""

    name: str
    reason: str


_current = Backend("torch", "not chosen yet")


def use(backend: Backend) -> None:
    """Make ``backend`` the one that this process runs on, once ``activate()`` is called."""
    global _current
    _current = backend


def current() -> Backend:
    """Return the framework that this process runs on, and why it was chosen."""
    return _current


def activate() -> None:
    """Let ``import torch`` mean OneFlow if that is the framework; on PyTorch, do nothing.

    Raises:
        ImportError: OneFlow cannot be loaded.
    """
    if _current.name == "oneflow":
        oneflow_compat.enable()


def deactivate() -> None:
    """Undo ``activate``."""
    oneflow_compat.disable()


def is_oneflow() -> bool:
    """Return whether OneFlow runs the models of this process."""
    return _current.name == "oneflow"


def choose_backend(environment: Mapping[str, str] = os.environ) -> Backend:
    """Choose the framework from ``FASTER_CHATGLM_6B_BACKEND`` (``auto`` if unset) and from what is installed.

    ``auto`` takes OneFlow if PyTorch is not installed. It also takes OneFlow if its fused operators can run: built with
    CUDA, with all of them, and on a GPU that its attention supports. Without any framework the import succeeds, and
    loading a model says what is missing.

    Raises:
        ValueError: the variable holds something else than ``auto``, ``torch`` or ``oneflow``.
        ImportError: the framework that the variable asks for, or the only one that is installed, cannot be used.
    """
    wanted = environment.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
    if wanted not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}={environment[BACKEND_VARIABLE]!r} is not a backend; "
            f"set it to one of {', '.join(BACKENDS)}, or unset it."
        )
    has_oneflow = versions.is_installed("oneflow")
    has_torch = versions.is_installed("torch") and not _oneflow_stands_in()
    if wanted == "oneflow":
        if not has_oneflow:
            raise ImportError(
                f"{BACKEND_VARIABLE}=oneflow asks for OneFlow, which is not installed; install it (docs/oneflow.md "
                f"says which builds there are), or unset {BACKEND_VARIABLE} to run on PyTorch."
            )
        return _oneflow(f"{BACKEND_VARIABLE}=oneflow")
    if wanted == "torch":
        if not has_torch:
            raise ImportError(
                f"{BACKEND_VARIABLE}=torch asks for PyTorch, which is not installed; "
                f"install it with `pip install 'torch>={OLDEST_TORCH}'`."
            )
        return Backend("torch", f"{BACKEND_VARIABLE}=torch")
    if not has_oneflow:
        installed = "PyTorch is installed and OneFlow is not" if has_torch else "PyTorch is not installed"
        return Backend("torch", f"auto: {installed}")
    if not has_torch:
        return _oneflow("auto: OneFlow is installed and PyTorch is not")
    refusal = _why_not_oneflow()
    if refusal is not None:
        return Backend("torch", f"auto: PyTorch and OneFlow are installed, but {refusal}")
    return _oneflow("auto: OneFlow has its fused operators and supports this GPU")


def _oneflow(reason: str) -> Backend:
    """Return OneFlow as the choice, after a check that it can take the place of torch in this process."""
    problem = _what_was_bound_before() or _transformers_problem()
    if problem is not None:
        raise ImportError(problem)
    return Backend("oneflow", reason)


def _what_was_bound_before() -> str | None:
    """Return what to tell a user whose modules are bound to real torch already; None if none is."""
    if _oneflow_stands_in():
        return None
    for package in ("torch", "transformers"):
        if sys.modules.get(package) is not None:
            return (
                f"{package} was imported before faster_chatglm_6b and is bound to PyTorch, but OneFlow must take the "
                "place of torch first; put `import faster_chatglm_6b` above every other import, or set "
                f"{BACKEND_VARIABLE}=torch."
            )
    return None


def _oneflow_stands_in() -> bool:
    """Return whether "torch" is OneFlow already: the package is reloaded, or the user switched OneFlow's mock on."""
    return oneflow_compat.is_enabled() or oneflow_compat.is_oneflow(sys.modules.get("torch"))


def _transformers_problem() -> str | None:
    """Return what to tell a user whose transformers does not work under OneFlow's mock of torch; None if it does."""
    found = versions.installed_version("transformers")
    if found is None or is_supported_on_oneflow(found):
        return None
    return (
        f"OneFlow can stand in for torch under transformers {OLDEST_TRANSFORMERS_ON_ONEFLOW} to 4.29.2, but {found} is "
        f"installed; install one of them with `pip install 'transformers=={OLDEST_TRANSFORMERS_ON_ONEFLOW}'`, or set "
        f"{BACKEND_VARIABLE}=torch and install PyTorch."
    )


def is_supported_on_oneflow(version: str) -> bool:
    """Return whether a version of transformers works under OneFlow's mock of torch."""
    return not versions.is_too_old(version, OLDEST_TRANSFORMERS_ON_ONEFLOW) and versions.is_too_old(
        version, FIRST_TRANSFORMERS_BEYOND_ONEFLOW
    )


def _why_not_oneflow() -> str | None:
    """Return why ``auto`` stays with PyTorch if both are installed, else None; the costly questions come last."""
    for package in ("torch", "transformers"):
        if sys.modules.get(package) is not None:
            return f"{package} was imported before and is bound to PyTorch"
    version = versions.installed_version("oneflow")
    if version is not None and versions.is_too_old(version, FIRST_FUSED_ONEFLOW):
        return f"OneFlow {version} lacks most of the fused operators"
    if _transformers_problem() is not None:
        return f"OneFlow does not work with transformers {versions.installed_version('transformers')}"
    return oneflow_compat.why_not_fused()


def require_transformers() -> None:
    """Raise ImportError unless the installed transformers is one that we can serve a checkpoint with."""
    if is_oneflow():
        problem = _transformers_problem()
        if problem is not None:
            raise ImportError(problem)
        return
    found = versions.installed_version("transformers")
    if found is not None and is_supported_on_oneflow(found) and versions.is_installed("oneflow"):
        raise ImportError(
            f"PyTorch runs the models here ({_current.reason}) and needs transformers {OLDEST_TRANSFORMERS} or newer, "
            f"but {found} is installed, which suits OneFlow; set {BACKEND_VARIABLE}=oneflow, or upgrade transformers."
        )
    _require("transformers", OLDEST_TRANSFORMERS)


def require_torch() -> None:
    """Raise ImportError unless the installed PyTorch is one that we can run a model with; OneFlow needs none."""
    if is_oneflow():
        return
    _require("torch", OLDEST_TORCH)


def framework_lines() -> list[str]:
    """List transformers and the framework, their versions and those that are needed, for ``status()``."""
    transformers = versions.installed_version("transformers")
    if not is_oneflow():
        return [
            f"transformers   {_version_note(transformers, OLDEST_TRANSFORMERS, NEWEST_TESTED_TRANSFORMERS)}",
            f"torch          {_version_note(versions.installed_version('torch'), OLDEST_TORCH)}",
        ]
    needed = f"{OLDEST_TRANSFORMERS_ON_ONEFLOW} to 4.29.2 is needed"
    if transformers is None:
        note = f"not installed ({needed})"
    else:
        note = transformers if is_supported_on_oneflow(transformers) else f"{transformers} ({needed})"
    return [f"transformers   {note}", f"oneflow        {versions.installed_version('oneflow')}, in the place of torch"]


def _version_note(version: str | None, oldest: str, newest_tested: str | None = None) -> str:
    if version is None:
        return f"not installed ({oldest} or newer is needed)"
    if versions.is_too_old(version, oldest):
        return f"{version} (too old: {oldest} or newer is needed)"
    if newest_tested is not None and versions.is_too_old(newest_tested, version):
        return f"{version} (newer than {newest_tested}, the newest that was tested)"
    return version


def _require(package: str, oldest: str) -> None:
    found = versions.installed_version(package)
    if found is None:
        raise ImportError(
            f"faster_chatglm_6b needs {package} {oldest} or newer to load a ChatGLM-6B checkpoint and found none; "
            f"install it with `pip install '{package}>={oldest}'`."
        )
    if versions.is_too_old(found, oldest):
        raise ImportError(
            f"faster_chatglm_6b needs {package} {oldest} or newer to load a ChatGLM-6B checkpoint and found {found}; "
            f"upgrade it with `pip install -U '{package}>={oldest}'`."
        )
